"""Owns where a model is computed: whole on this process's device, layer by layer through it, or spread by accelerate."""

import gc
from pathlib import Path

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn

from pipeline import memory, models, processes
from pipeline.perplexity import Logits
from pipeline.recipe import Recipe

ROOM = 0.8  # of the free GPU memory may be weights
BATCH = 8  # where `auto` has nothing to find out
LARGEST = 64  # that `auto` tries, in windows; lm-eval's own for questions


def choose(recipe: Recipe, folder: Path) -> str:
    """whole, stream or device_map; `auto` is whole where the weights fit the device, else stream.

    On a CPU nothing needs to fit: the weights are a view of the files, which the kernel reads and drops as needed.
    """
    wanted, device = recipe.evaluate.placement, processes.device()
    if wanted != "auto" or device.type == "cpu":
        return "whole" if wanted == "auto" else wanted
    return "whole" if memory.size_gib(models.load(folder, recipe)) < ROOM * memory.free_gib(device) else "stream"


def resident(recipe: Recipe, folder: Path, placement: str) -> nn.Module:
    """The model, ready for any call: on this process's device; or, where that is a GPU and too small, spread by
    accelerate over this process's share of the node's GPUs, then the host's memory, then the disk."""
    device = processes.device()
    if placement == "whole" or (placement == "stream" and device.type == "cpu"):
        return models.load(folder, recipe).to(device)
    node = processes.local_world_size()
    gpus = range(processes.local_rank(), torch.cuda.device_count(), node)
    room: dict[int | str, int] = {gpu: int(ROOM * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}
    room["cpu"] = int(ROOM * memory.free_gib(torch.device("cpu")) / node * memory.GIB)
    return models.load(folder, recipe, device_map="auto", max_memory=room)


def windows_at_once(wanted: int | str, logits: Logits, window_T: Tensor, most: int) -> int:
    """`wanted`; for `auto`, what all processes' GPUs have room for, by trying: at most `most`, at most `LARGEST`."""
    if wanted != "auto":
        return wanted
    if processes.device().type == "cpu":
        return BATCH

    @find_executable_batch_size(starting_batch_size=min(LARGEST, most))
    @torch.no_grad()
    def found(batch_size: int) -> int:
        for _ in logits([window_T.expand(batch_size, -1)]):
            torch.cuda.synchronize()
        return batch_size

    return int(processes.gather_rows(torch.tensor([found()], device=processes.device())).min())


def let_go() -> None:
    """Frees the memory of a model that nothing refers to any more: lm-eval's wrapper holds itself, and so the model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
