"""`python launch.py apply MODEL_FOLDER MASKS_FILE TARGET_FOLDER`: writes a model with its pruned weights at zero.

From the dense model this gives what the prune stage wrote, tensor by tensor to the bit, where the method only scores
weights; one that also updates them (sparsegpt, the seq and iter methods) kept other weights than the dense model's.
"""

import shutil
from collections.abc import Iterator

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import files, models
from pipeline.errors import UserError
from pipeline.masks import Masks, apply_, by_matrix
from pipeline.recipe import Recipe
from pipeline.verify import paths

USAGE = "type `python launch.py apply MODEL_FOLDER MASKS_FILE TARGET_FOLDER`"
SHARD = 1 << 30  # bytes, and so of memory


def main(arguments: list[str]) -> None:
    """Writes TARGET_FOLDER, which must not be there: whole or not at all."""
    folder, path, target = paths(arguments, 3, USAGE)
    if target.exists():
        raise UserError(f"{target} is there already: choose another TARGET_FOLDER, or remove it")
    masks, _ = Masks.load(path)
    model = models.load(folder, Recipe())
    for _ in masks.matched(model.named_parameters()):
        pass  # refuses another model's masks before anything is written
    beside = target.with_name(f".{target.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    shards = list(_shards(model))
    state = model.state_dict()
    for number, names in enumerate(shards, 1):
        weights = {name: _masked(name, state[name], masks) for name in names}
        with files.whole(beside / f"model-{number:05d}-of-{len(shards):05d}.safetensors") as file:
            save_file(weights, file, {"format": "pt"})
        print(f"{number} of {len(shards)} files written", flush=True)
    models.write_index(beside)
    models.copy_beside(folder, beside)
    beside.rename(target)
    print(f"{target}: {len(masks)} matrices masked, {masks.sparsity():.2%} of their weights are zero")


def _shards(model: nn.Module) -> Iterator[list[str]]:
    """The names of what is saved, tied weights once, in files of about `SHARD` bytes."""
    once = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    names: list[str] = []
    size = 0
    for name, tensor in model.state_dict().items():
        if name in once:
            names, size = [*names, name], size + tensor.numel() * tensor.element_size()
            if size > SHARD:
                yield names
                names, size = [], 0
    if names:
        yield names


def _masked(name: str, weight: Tensor, masks: Masks) -> Tensor:
    """A copy where something is pruned: the model's own weights are a view of the files."""
    if not any(matrix in masks for matrix, _ in by_matrix([(name, weight)])):
        return weight.contiguous()
    weight = weight.clone(memory_format=torch.contiguous_format)
    for matrix, part in by_matrix([(name, weight)]):
        if matrix in masks:
            apply_(part, masks[matrix])
    return weight
