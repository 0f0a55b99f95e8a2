"""`python launch.py apply MODEL_FOLDER MASKS_FILE TARGET_FOLDER`: writes a copy of a model with the pruned weights set to zero.

From the dense model this reproduces the prune stage's model bit for bit, unless the kept weights were updated as well
(sparsegpt, the seq and iter methods, prune.update).
"""

from torch import Tensor

from pipeline.commands.verify import paths
from pipeline.models.rewrite import layers, rewrite
from pipeline.runtime import files
from pipeline.sparsity.masks import Masks, apply_, by_matrix

USAGE = "run `python launch.py apply MODEL_FOLDER MASKS_FILE TARGET_FOLDER`"


def main(arguments: list[str]) -> None:
    """Writes TARGET_FOLDER, which must not exist, atomically."""
    (folder, path, target), recipe = paths(arguments, 3, USAGE)
    with files.new_folder(target) as work:
        masks = Masks.load(path)
        model, _ = layers(folder, recipe)
        masks.refuse_other_model(model)
        rewrite(folder, work, recipe, lambda name, weight: _masked(name, weight, masks))
    print(f"{target}: {len(masks)} matrices masked, {masks.sparsity():.2%} of their weights are zero")


def _masked(name: str, weight: Tensor, masks: Masks) -> Tensor | None:
    """The masked weight, or None if nothing of it is pruned. A copy, because the weight may be mapped from a file."""
    matrices = [matrix for matrix, _ in by_matrix([(name, weight)])]
    if not any(matrix in masks for matrix in matrices):
        return None
    weight = weight.clone()
    for matrix, part in by_matrix([(name, weight)]):
        if matrix in masks:
            apply_(part, masks[matrix])
    return weight
