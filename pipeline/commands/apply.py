"""`python launch.py apply MODEL_FOLDER MASKS_FILE TARGET_FOLDER`: writes a model with its pruned weights at zero.

From the dense model this gives what the prune stage wrote, tensor by tensor to the bit, where the method only scores
weights; one that also updates them (sparsegpt, the seq and iter methods) kept other weights than the dense model's.
"""

import shutil

from torch import Tensor

from pipeline.commands.verify import paths
from pipeline.models.rewrite import layers, rewrite
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks, apply_, by_matrix

USAGE = "run `python launch.py apply MODEL_FOLDER MASKS_FILE TARGET_FOLDER`"


def main(arguments: list[str]) -> None:
    """Writes TARGET_FOLDER, which must not be there: whole or not at all."""
    folder, path, target = paths(arguments, 3, USAGE)
    if target.exists():
        raise UserError(f"{target} is there already: choose another TARGET_FOLDER, or remove it")
    masks = Masks.load(path)
    model, _ = layers(folder, Recipe())
    for _ in masks.matched(model.named_parameters()):
        pass  # refuses another model's masks before anything is written
    tmp = target.with_name(f".{target.name}.part")
    shutil.rmtree(tmp, ignore_errors=True)
    rewrite(folder, tmp, Recipe(), lambda name, weight: _masked(name, weight, masks))
    tmp.rename(target)
    print(f"{target}: {len(masks)} matrices masked, {masks.sparsity():.2%} of their weights are zero")


def _masked(name: str, weight: Tensor, masks: Masks) -> Tensor | None:
    """A copy where something is pruned: the weights may be a view of the files."""
    matrices = [matrix for matrix, _ in by_matrix([(name, weight)])]
    if not any(matrix in masks for matrix in matrices):
        return None
    weight = weight.clone()
    for matrix, part in by_matrix([(name, weight)]):
        if matrix in masks:
            apply_(part, masks[matrix])
    return weight
