"""Chooses where a model runs: whole on this process's device, streamed through it layer by layer, or split by accelerate."""

from collections.abc import Callable, Iterator

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn

from pipeline.runtime import memory, processes

ROOM = 0.8  # share of the free GPU memory for weights
BATCH = 8  # batch size for `auto` if there is nothing to try
LARGEST = 64  # largest batch that `auto` tries; lm-eval's own limit for questions is the same


def choose(wanted: str, load: Callable[[], nn.Module]) -> str:
    """whole, stream or device_map. `auto` is whole if the weights fit the devices, else stream. All ranks must call it.

    On a CPU everything fits: the weights are a view of the files, which the kernel pages in and out.
    """
    device = processes.device()
    if wanted != "auto" or device.type == "cpu":
        return "whole" if wanted == "auto" else wanted
    too_large = memory.size_gib(load()) >= ROOM * memory.free_gib(device)
    return "stream" if processes.any_rank(too_large) else "whole"


def place(placement: str, load: Callable[..., nn.Module]) -> nn.Module:
    """The model, ready for any call: on this process's device or, if that is a GPU and too small, split by accelerate over
    this process's share of the node's GPUs, then host memory, then disk."""
    device = processes.device()
    if placement == "whole" or (placement == "stream" and device.type == "cpu"):
        return load().to(device)
    node = processes.local_world_size()
    gpus = range(processes.local_rank(), torch.cuda.device_count(), node)
    max_memory: dict[int | str, int] = {gpu: int(ROOM * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}
    max_memory["cpu"] = int(ROOM * memory.free_gib(torch.device("cpu")) / node * memory.GIB)
    return load(device_map="auto", max_memory=max_memory)


def batch_number(batch_size: int | str) -> int:
    """The batch size as a number: `BATCH` for `auto`."""
    return BATCH if batch_size == "auto" else batch_size


def find_batch_size(
    batch_size: int | str, logits: Callable[[list[Tensor]], Iterator[Tensor]], windows_NT: Tensor
) -> int:
    """`batch_size`; for `auto` on GPUs the largest that fits all processes, found by trying, at most one process's share.
    Raises `torch.OutOfMemoryError` if not even one window fits."""
    if batch_size != "auto" or processes.device().type == "cpu":
        return batch_number(batch_size)
    share = -(-len(windows_NT) // processes.world_size())

    @find_executable_batch_size(starting_batch_size=min(LARGEST, share))
    @torch.no_grad()
    def largest(batch_size: int) -> int:
        for _ in logits([windows_NT[:1].expand(batch_size, -1)]):
            torch.cuda.synchronize()
        return batch_size

    try:
        most = largest()
    except RuntimeError as error:
        if "executable batch size" not in str(error):
            raise
        raise torch.OutOfMemoryError("not even one window fits") from error
    return int(processes.gather_rows(torch.tensor([most], device=processes.device())).min())
