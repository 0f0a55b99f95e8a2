"""Counts how much of a model's blocks is pruned, and what stays dense and why. Does not import torch."""

import re
from collections.abc import Collection
from typing import NamedTuple

PRUNED = "pruned"
OUTSIDE = "outside the layers"
NEVER_CALLED = "the model never calls it with calibration text"


class Entry(NamedTuple):
    """A parameter of a block with two or more dimensions, or one expert's slice of it."""

    block: str
    weights: int
    reason: str | None  # why it cannot be pruned


class Coverage:
    """All entries by name; `chosen` are the matrices that have a pattern."""

    def __init__(self, entries: dict[str, Entry], chosen: Collection[str]) -> None:
        self.entries, self.chosen = entries, chosen

    def rows(self, pruned: Collection[str]) -> list[dict[str, str | int]]:
        """One row for what is pruned, then one per kind that stays dense: "kind", "reason", "matrices", "weights"."""
        rows: dict[tuple[str, str], dict] = {}
        for name, entry in self.entries.items():
            reason = entry.reason or (NEVER_CALLED if name in self.chosen else "prune.overrides")
            kind = re.sub(r"(?<=[.\[])\d+(?=[.\]])", "*", name.removeprefix(f"{entry.block}."))
            key = ("all", PRUNED) if name in pruned else (kind, reason)
            row = rows.setdefault(key, {"kind": key[0], "reason": key[1], "matrices": 0, "weights": 0})
            row["matrices"] += 1
            row["weights"] += entry.weights
        return sorted(rows.values(), key=lambda row: row["reason"] != PRUNED)

    def describe(self, pruned: Collection[str]) -> list[tuple[str, str]]:
        """See the function `describe`."""
        return describe(self.rows(pruned))


def describe(rows: list[dict]) -> list[tuple[str, str]]:
    """`rows`, in memory or as read from a CSV, as pairs (what, how much) of text to print."""
    total = sum(int(row["weights"]) for row in rows if row["reason"] != OUTSIDE)
    pairs = []
    for row in rows:
        count, weights = int(row["matrices"]), int(row["weights"])
        if row["reason"] == PRUNED:
            pairs.append((PRUNED, f"{weights:,} of {total:,} weights in the layers' matrices ({weights / total:.1%})"))
        else:
            pairs.append((row["kind"], f"stays dense: {row['reason']} ({count} x {weights // count:,} weights)"))
    return pairs
