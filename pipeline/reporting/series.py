"""Owns the way from the rows that stages log to the points that are drawn."""

import csv
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

Rows = list[dict[str, str]]
Points = list[tuple[float, float]]  # (x, y)
Numbers = dict[str, tuple[float, float | None]]  # by name: value and standard error


class Mark(NamedTuple):
    """One method's numbers by pattern; those of one method stand at one place, those that are healed filled."""

    method: str
    healing: str
    numbers: Numbers


class Panel(NamedTuple):
    title: str
    patterns: list[str]
    dense: tuple[float, float | None] | None
    marks: list[Mark]


def read(path: Path) -> Rows:
    """A CSV's rows by header, as text; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(row: dict[str, str], key: str) -> float | None:
    """None for what is missing, empty, text or not finite."""
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def points(rows: Rows, x: str, y: str) -> Points:
    found = [(number(row, x), number(row, y)) for row in rows]
    return [(here, there) for here, there in found if here is not None and there is not None]


def by_type(rows: Rows, y: str) -> dict[str, Points]:
    """(layer, `y`) of each type of matrix, such as q_proj; of the experts of a layer the mean."""
    values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if (layer := number(row, "layer")) is not None and (value := number(row, y)) is not None:
            values[_type(row["matrix"])][layer].append(value)
    # q_proj for self_attn.q_proj, where no other ends so
    ends = [kind.rpartition(".")[2] for kind in values]
    short = {kind: end if ends.count(end) == 1 else kind for kind, end in zip(values, ends)}
    return {
        short[kind]: [(layer, sum(found) / len(found)) for layer, found in sorted(layers.items())]
        for kind, layers in values.items()
    }


def together(series: dict[str, Points]) -> dict[str, Points]:
    """Series that say the same to three decimals become one, named by all of them."""
    names: dict[tuple, list[str]] = defaultdict(list)
    for name, found in series.items():
        names[tuple((x, round(y, 3)) for x, y in found)].append(name)
    return {
        f"all {len(same)} matrices" if len(same) == len(series) > 1 else ", ".join(same): list(found)
        for found, same in names.items()
    }


def _type(parameter: str) -> str:
    """`model.layers.3.mlp.experts.down_proj[5]` -> `mlp.experts.down_proj`."""
    inside = re.split(r"\.\d+\.", parameter, maxsplit=1)[-1]
    return re.sub(r"\[\d+\]$|\.weight$", "", inside)
