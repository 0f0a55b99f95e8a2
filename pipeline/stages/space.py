"""Estimates the disk space that stages need, in bytes."""

import math
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pipeline.models import file_names, loading, model_files
from pipeline.registry import FINETUNE_METHODS
from pipeline.runtime.errors import UserError
from pipeline.runtime.memory import GIB
from pipeline.settings.schema import Recipe
from pipeline.stages.export import last_model

SMALL = 2**17  # tables, logs, a report
RUN = "the run"  # all of its stages


def check(stage: str, recipe: Recipe, inputs: dict[str, Path], work: Path) -> None:
    """Raises `UserError` if the disk of `work` has too little room for what the stage has yet to write.

    For `RUN`, `work` is the run folder. Finished stages need nothing more, and all models are assumed to have the size of the
    dense one.
    """
    stages, needed, free = estimate(stage, recipe, inputs, work)
    if needed > free:
        raise UserError(
            f"{', '.join(stages)} need{'s' * (len(stages) == 1)} about {text(needed)} more on the disk of {work.parent}, where "
            f"{text(free)} are free: free some space, or set run_dir=... on another disk"
        )


def estimate(stage: str, recipe: Recipe, inputs: dict[str, Path], work: Path) -> tuple[list[str], int, int]:
    """The stages to run, the bytes that they have yet to write, and the free bytes on the disk of `work`."""
    needs = {"permute": _prune, "prune": _prune, "reconstruct": _prune, "finetune": _finetune, "export": _export}
    stages, folders = [stage], [work]
    if stage == RUN:
        stages = [name for name in recipe.stages if not (work / name).exists()]
        folders = [work / f".{name}" for name in stages]
    needed = sum(needs[name](recipe, inputs) if name in needs else SMALL for name in stages)
    written = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    existing = next(folder for folder in (work.absolute(), *work.absolute().parents) if folder.exists())
    return stages, needed - written, shutil.disk_usage(existing).free


def _prune(recipe: Recipe, inputs: dict[str, Path]) -> int:
    """The model, and one bit per weight twice (by layer, then in one file). The model is written twice if its parameters have
    other names in its files: by layer, then converted."""
    folder = loading.dense_folder(recipe, inputs)
    exists = (folder / "config.json").is_file()  # False if the pretrain stage has not written it yet
    copies = 2 if exists and file_names.converts(loading.skeleton(folder, recipe)) else 1
    shapes = _plain(folder, recipe) if loading.quantization(folder) else _shapes(folder)
    size = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype).itemsize
    return sum(copies * count * (size or itemsize) + count // 4 for count, itemsize, _ in shapes) + SMALL


def _finetune(recipe: Recipe, inputs: dict[str, Path]) -> int:
    """The model, the best and the last trained weights in float32, and two checkpoints with both moments of the optimizer,
    because a new checkpoint is written before the old one is removed."""
    origin = inputs["prune"] / "model" if "prune" in inputs else loading.dense_folder(recipe, inputs)
    shapes, settings = _shapes(origin), recipe.finetune
    method = FINETUNE_METHODS.entry(settings.method)
    trained = sum(method.trained_parameters(settings, count, width) for count, _, width in shapes)
    return sum(count * itemsize for count, itemsize, _ in shapes) + 4 * trained * (2 + 2 * 3) + SMALL


def _export(recipe: Recipe, inputs: dict[str, Path]) -> int:
    """At most the model and one bit per weight; pruned weights are not subtracted."""
    shapes = _shapes(last_model(inputs) if "prune" in inputs else loading.dense_folder(recipe, inputs))
    return sum(count * itemsize + count // 8 for count, itemsize, _ in shapes) + SMALL


def _plain(folder: Path, recipe: Recipe) -> list[tuple[int, int, int]]:
    """Like `_shapes`, for the dequantised weights of a quantised model."""
    model = loading.skeleton(folder, recipe)
    itemsize = (model.config.dtype or torch.bfloat16).itemsize
    return [(p.numel(), itemsize, sum(p.shape) if p.dim() == 2 else 0) for p in model.parameters()]


def _shapes(folder: Path) -> list[tuple[int, int, int]]:
    """(weights, bytes per weight, rows + columns or 0 if not a matrix) of each tensor, from the files' headers."""
    shapes = []
    for path in model_files.weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    shape, bits = part.get_shape(), re.search(r"\d+", part.get_dtype())  # such as BF16
                    width = sum(shape) if len(shape) == 2 else 0
                    shapes.append((math.prod(shape), int(bits[0]) // 8 if bits else 1, width))
        except (SafetensorError, OSError):  # written by torch.save, or damaged; loading reports the latter
            shapes.append((path.stat().st_size // 2 if path.exists() else 0, 2, 0))
    return shapes


def text(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"
