"""Owns the estimate of the disk space that a stage needs. All in bytes."""

import math
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pipeline.models import file_names, loading, model_files
from pipeline.registry import FINETUNE_METHODS
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe

GIB = 2**30
SMALL = 2**17  # tables, logs, a report


RUN = "the run"  # all of its stages


def check(stage: str, recipe: Recipe, inputs: dict[str, Path], work: Path) -> None:
    """`UserError` where the disk of `work` has no room for what the stage will write and has not written yet.

    For the stage `RUN`, `work` is the run's folder, in which the stages that are finished need nothing more, and what a
    stage reads from one before is taken to be as large as the dense model.
    """
    stages, more, free = estimate(stage, recipe, inputs, work)
    if more > free:
        who = f"{', '.join(stages)} need{'s' * (len(stages) == 1)}"
        raise UserError(
            f"{who} about {text(more)} more on the disk of {work.parent}, where {text(free)} are free: make "
            "room, or set run_dir=... on another disk"
        )


def estimate(stage: str, recipe: Recipe, inputs: dict[str, Path], work: Path) -> tuple[list[str], int, int]:
    """The stages that `check` asks about, what they will still write, and what is free on the disk of `work`."""
    needs = {"prune": _prune, "reconstruct": _prune, "finetune": _finetune, "export": _export}
    stages, folders = [stage], [work]
    if stage == RUN:
        stages = [name for name in recipe.stages if not (work / name).exists()]
        folders = [work / f".{name}" for name in stages]
    needed = sum(needs.get(name, _little)(recipe, inputs) for name in stages)
    written = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    place = next(folder for folder in (work.absolute(), *work.absolute().parents) if folder.exists())
    return stages, needed - written, shutil.disk_usage(place).free


def _prune(recipe: Recipe, inputs: dict[str, Path]) -> int:
    """The model once more (twice where its files have other names than the model: by layer, then as they are to be), and a
    bit per weight twice: by layer and in one file."""
    folder = loading.dense_folder(recipe, inputs)
    known = (folder / "config.json").is_file()  # not that of a pretrain stage which is still to run
    copies = 2 if known and file_names.converts(loading.skeleton(folder, recipe)) else 1
    shapes = _plain(folder, recipe) if loading.quantization(folder) else _shapes(folder)
    size = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype).itemsize
    return sum(copies * count * (size or itemsize) + count // 4 for count, itemsize, _ in shapes) + SMALL


def _finetune(recipe: Recipe, inputs: dict[str, Path]) -> int:
    """The model once more; what trains, in float32, at its best and at the end; and twice with both moments of the
    optimizer, for a checkpoint replaces the one before."""
    origin = inputs["prune"] / "model" if "prune" in inputs else loading.dense_folder(recipe, inputs)
    shapes, settings = _shapes(origin), recipe.finetune
    method = FINETUNE_METHODS.entry(settings.method)
    trained = sum(method.trained(settings, count, width) for count, _, width in shapes)
    return sum(count * itemsize for count, itemsize, _ in shapes) + 4 * trained * (2 + 2 * 3) + SMALL


def _export(recipe: Recipe, inputs: dict[str, Path]) -> int:
    """At most the model once more and a bit per weight: how much is pruned is known by matrix only."""
    model = next((inputs[stage] for stage in ("finetune", "reconstruct", "prune") if stage in inputs), None)
    shapes = _shapes(model / "model" if model else loading.dense_folder(recipe, inputs))
    return sum(count * itemsize + count // 8 for count, itemsize, _ in shapes) + SMALL


def _little(recipe: Recipe, inputs: dict[str, Path]) -> int:
    return SMALL


def _plain(folder: Path, recipe: Recipe) -> list[tuple[int, int, int]]:
    """The same as `_shapes` of a quantised model's plain weights."""
    model = loading.skeleton(folder, recipe)
    itemsize = (model.config.dtype or torch.bfloat16).itemsize
    return [(p.numel(), itemsize, sum(p.shape) if p.dim() == 2 else 0) for p in model.parameters()]


def _shapes(folder: Path) -> list[tuple[int, int, int]]:
    """(weights, bytes of each, rows + columns of a matrix, else 0) by tensor, from the files' headers."""
    found = []
    for path in model_files.weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    shape, bits = part.get_shape(), re.search(r"\d+", part.get_dtype())  # such as BF16
                    width = sum(shape) if len(shape) == 2 else 0
                    found.append((math.prod(shape), int(bits[0]) // 8 if bits else 1, width))
        except (SafetensorError, OSError):  # a file of torch.save, or a damaged one, which `models.load` will name
            found.append((path.stat().st_size // 2 if path.exists() else 0, 2, 0))
    return found


def text(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"
