"""Plain tables for a terminal."""

from collections.abc import Iterable, Iterator, Sequence


def lines(rows: Iterable[Sequence[str]], limit: int = 32) -> Iterator[str]:
    """Aligned columns, two spaces apart. Cells wider than `limit` do not widen their column."""
    rows = list(rows)
    widths = [max((len(row[i]) for row in rows if len(row[i]) <= limit), default=0) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
