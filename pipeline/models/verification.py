"""Owns the check of a model folder against the masks that it should keep."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.models.rewrite import parameters
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks, Violation, violation_of


@dataclass(frozen=True)
class Checked:
    """A masked matrix as it is in a model folder."""

    name: str
    weights: int
    zeros: int
    violation: Violation | None  # the pruned weights that are not zero


def checked(folder: Path, masks: Masks, recipe: Recipe) -> Iterator[Checked]:
    """Each masked matrix of any model folder that transformers loads, in the dtype of its files, one at a time.

    Raises `UserError` where the folder is damaged, or a masked matrix is missing or of another shape.
    """
    for name, weight in masks.matched(parameters(folder, recipe)):
        yield Checked(name, weight.numel(), int((weight == 0).sum()), violation_of(name, weight, masks[name]))
