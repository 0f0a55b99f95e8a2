"""Checks a model folder against the masks that it should keep."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.models.rewrite import parameters
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks, Violation, violation_of


@dataclass(frozen=True)
class CheckedMatrix:
    """A masked matrix as stored in a model folder."""

    name: str
    weights: int
    zeros: int
    violation: Violation | None  # its nonzero pruned weights


def check_matrices(folder: Path, masks: Masks, recipe: Recipe) -> Iterator[CheckedMatrix]:
    """Yields each masked matrix of a model folder that transformers can load, in the dtype of its files.

    Raises `UserError` if the folder is damaged, or if a masked matrix is missing or of another shape.
    """
    for name, weight in masks.matched(parameters(folder, recipe)):
        yield CheckedMatrix(name, weight.numel(), int((weight == 0).sum()), violation_of(name, weight, masks[name]))
