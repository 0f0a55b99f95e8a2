"""Owns where a model is computed: whole on this process's device, layer by layer through it, or spread by accelerate."""

from collections.abc import Callable, Iterator

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn

from pipeline.runtime import memory, processes

ROOM = 0.8  # of the free GPU memory may be weights
BATCH = 8  # where `auto` has nothing to find out
LARGEST = 64  # windows that `auto` tries; lm-eval's own, for questions, is the same


def choose(wanted: str, load: Callable[[], nn.Module]) -> str:
    """whole, stream or device_map; `auto` is whole where the weights fit the devices, else stream; all ranks must call.

    On a CPU nothing needs to fit: the weights are a view of the files, which the kernel reads and drops as needed.
    """
    device = processes.device()
    if wanted != "auto" or device.type == "cpu":
        return "whole" if wanted == "auto" else wanted
    small = memory.size_gib(load()) >= ROOM * memory.free_gib(device)
    return "stream" if processes.any_rank(small) else "whole"


def resident(placement: str, load: Callable[..., nn.Module]) -> nn.Module:
    """The model, ready for any call: on this process's device; or, where that is a GPU and too small, spread by
    accelerate over this process's share of the node's GPUs, then the host's memory, then the disk."""
    device = processes.device()
    if placement == "whole" or (placement == "stream" and device.type == "cpu"):
        return load().to(device)
    node = processes.local_world_size()
    gpus = range(processes.local_rank(), torch.cuda.device_count(), node)
    room: dict[int | str, int] = {gpu: int(ROOM * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}
    room["cpu"] = int(ROOM * memory.free_gib(torch.device("cpu")) / node * memory.GIB)
    return load(device_map="auto", max_memory=room)


def number(batch_size: int | str) -> int:
    return BATCH if batch_size == "auto" else batch_size


def windows_at_once(
    batch_size: int | str, logits: Callable[[list[Tensor]], Iterator[Tensor]], windows_NT: Tensor
) -> int:
    """`batch_size`; for `auto` on GPUs, what all processes have room for, by trying: no more than is one's share."""
    if batch_size != "auto" or processes.device().type == "cpu":
        return number(batch_size)
    share = -(-len(windows_NT) // processes.world_size())

    @find_executable_batch_size(starting_batch_size=min(LARGEST, share))
    @torch.no_grad()
    def found(tried: int) -> int:
        for _ in logits([windows_NT[:1].expand(tried, -1)]):
            torch.cuda.synchronize()
        return tried

    try:
        most = found()
    except RuntimeError as error:
        if "executable batch size" not in str(error):
            raise
        raise torch.OutOfMemoryError("not even one window fits") from error
    return int(processes.gather_rows(torch.tensor([most], device=processes.device())).min())
