"""Owns the account of how much of a model's blocks is pruned, and what stays dense and why. Imports no torch."""

import re
from collections.abc import Collection
from typing import NamedTuple

PRUNED = "pruned"
OUTSIDE = "outside the layers"
NEVER_CALLED = "the model never calls it with calibration text"


class Entry(NamedTuple):
    """A parameter of two or more dimensions in a block, or one expert's part of it."""

    block: str
    weights: int
    reason: str | None  # why it can be no matrix that is pruned


class Coverage:
    """Of all entries by name; `chosen` are the names of the matrices that have a pattern."""

    def __init__(self, entries: dict[str, Entry], chosen: Collection[str]) -> None:
        self.entries, self.chosen = entries, chosen

    def rows(self, pruned: Collection[str]) -> list[dict[str, str | int]]:
        """How many weights are pruned, then by kind those that stay dense: "kind", "reason", "matrices", "weights"."""
        rows: dict[tuple[str, str], dict] = {}
        for name, entry in self.entries.items():
            reason = entry.reason or (NEVER_CALLED if name in self.chosen else "prune.overrides")
            kind = re.sub(r"(?<=[.\[])\d+(?=[.\]])", "*", name.removeprefix(f"{entry.block}."))
            key = ("all", PRUNED) if name in pruned else (kind, reason)
            row = rows.setdefault(key, {"kind": key[0], "reason": key[1], "matrices": 0, "weights": 0})
            row["matrices"] += 1
            row["weights"] += entry.weights
        return sorted(rows.values(), key=lambda row: row["reason"] != PRUNED)

    def told(self, pruned: Collection[str]) -> list[tuple[str, str]]:
        return told(self.rows(pruned))


def told(rows: list[dict]) -> list[tuple[str, str]]:
    """(what, how much) for people, of `rows` as they are or as a CSV holds them."""
    total = sum(int(row["weights"]) for row in rows if row["reason"] != OUTSIDE)
    pairs = []
    for row in rows:
        count, weights = int(row["matrices"]), int(row["weights"])
        if row["reason"] == PRUNED:
            pairs.append((PRUNED, f"{weights:,} of {total:,} weights in the layers' matrices ({weights / total:.1%})"))
        else:
            pairs.append((row["kind"], f"stays dense: {row['reason']} ({count} x {weights // count:,} weights)"))
    return pairs
