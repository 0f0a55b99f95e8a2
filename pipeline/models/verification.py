"""Checks a model folder against the masks that it should keep."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.models import loading
from pipeline.models.rewrite import layers
from pipeline.runtime import processes
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks, Violation, violation_of


@dataclass(frozen=True)
class CheckedMatrix:
    """A masked matrix as stored in a model folder."""

    name: str
    weights: int
    zeros: int
    violation: Violation | None  # its nonzero pruned weights


def check_matrices(folder: Path, masks: Masks, recipe: Recipe) -> list[CheckedMatrix]:
    """Checks each masked matrix of a model folder that transformers can load, in the dtype of its files. The layers are divided
    among the processes and checked on their devices. All ranks must call it.

    Raises `UserError` if the folder is damaged, or if a masked matrix is missing or of another shape.
    """
    rank, world_size = processes.rank(), processes.world_size()
    if loading.quantization(folder):  # `layers` reads the whole model, so only rank 0 does
        world_size = 1
    local: dict[int, list[CheckedMatrix]] = {}
    if rank < world_size:
        for number, read in list(enumerate(layers(folder, recipe)[1].values()))[rank::world_size]:
            local[number] = list(_checked(read(), masks))
    by_layer = {number: checked for part in processes.all_ranks(local) for number, checked in part.items()}
    matrices = [matrix for number in sorted(by_layer) for matrix in by_layer[number]]
    masks.refuse_missing(set(masks) - {matrix.name for matrix in matrices})
    return matrices


def _checked(weights: Iterator[tuple[str, Tensor]], masks: Masks) -> Iterator[CheckedMatrix]:
    device = processes.device()
    for name, weight in masks.matched(weights, whole=False):
        weight = weight.to(device)
        zeros = weight.numel() - int(weight.count_nonzero())
        yield CheckedMatrix(name, weight.numel(), zeros, violation_of(name, weight, masks.on(device, name)))
