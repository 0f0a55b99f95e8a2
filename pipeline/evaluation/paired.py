"""Compares two models on the same windows and questions: mean differences and their paired standard errors.

Most of the variance of a loss or an answer comes from the text and is shared, so the error of the difference is far
smaller than the two models' errors suggest.
"""

import math
from statistics import fmean, stdev
from typing import Any


def standard_error(values: list[float]) -> float | None:
    """The standard error of the mean of `values`; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The differences ours - theirs: {"perplexity": {data set: {"log", "stderr"}}, "zero_shot": {task: {"acc", "stderr"}},
    "accuracy": {data set: {"acc", "stderr"}}}.

    `ours` and `theirs` are {"losses": {data set: [loss of each window]}, "correct": {task: [0 or 1 for each question]}, and of
    image classifiers "images": {data set: [0 or 1 for each image]}}.
    Entries that only one model has, and those with a single value, are left out.
    """
    found = {
        "perplexity": _means(ours["losses"], theirs["losses"], "log"),
        "zero_shot": _means(ours["correct"], theirs["correct"], "acc"),
    }
    images = _means(ours.get("images", {}), theirs.get("images", {}), "acc")
    return found | ({"accuracy": images} if images else {})


def _means(ours: dict[str, list], theirs: dict[str, list], name: str) -> dict[str, dict[str, float]]:
    found = {}
    for key in (key for key in ours if key in theirs):
        change = [mine - other for mine, other in zip(ours[key], theirs[key], strict=True)]
        if (error := standard_error(change)) is not None:
            found[key] = {name: fmean(change), "stderr": error}
    return found
