"""Chooses where a model runs: whole on this process's device, streamed through it layer by layer, or split by accelerate."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn

from pipeline.runtime import memory, processes

ROOM = 0.8  # share of the free GPU memory for weights
BATCH = 8  # batch size for `auto` if there is nothing to try
IDLE = 1 << 40  # the share of a process without work begins after the last window
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


class Share(NamedTuple):
    """This process's share of the windows and questions: every `of`-th, from `number` on; none if `number` is `IDLE`: then the
    process holds no model. `gpus`: the GPUs that hold its model, if that is split; `holders`: processes of a node with a
    model."""

    number: int
    of: int
    gpus: tuple[int, ...] = ()
    holders: int = 1


def share(placement: str, load: Callable[[], nn.Module]) -> Share:
    """A model that is split takes several GPUs of the node, and as many processes hold one as there are such groups of GPUs.
    All ranks must call it."""
    device, node = processes.device(), processes.local_world_size()
    if placement == "whole" or device.type == "cpu":
        return Share(processes.rank(), processes.world_size(), holders=node)
    needed = math.ceil(memory.size_gib(load()) / (ROOM * memory.free_gib(device)))
    return share_of_gpus(int(processes.gather_rows(torch.tensor([needed], device=device)).max()))


def share_of_gpus(needed: int = 1) -> Share:
    """This process's share if a model takes `needed` GPUs."""
    node, own = processes.local_world_size(), processes.device().index or 0
    place_of_node = (processes.rank() // node, processes.nodes())
    return divide(needed, torch.cuda.device_count(), processes.local_rank(), node, *place_of_node, own)


def divide(needed: int, visible: int, local_rank: int, local: int, node: int, nodes: int, own: int) -> Share:
    """`share_of_gpus` of any process. `visible`: the GPUs that it sees (all of the node, or its `own`); `local`: the processes
    of a node."""
    if visible < local:
        return Share(node * local + local_rank, nodes * local, (own,), local)
    holders = max(1, min(local, visible // needed))
    if local_rank >= holders:
        return Share(IDLE, nodes * holders)
    size = visible // holders
    gpus = tuple(range(local_rank * size, (local_rank + 1) * size))
    return Share(node * holders + local_rank, nodes * holders, gpus, holders)


def place(share: Share, load: Callable[..., nn.Module], placement: str) -> nn.Module:
    """The model, ready for any call: on this process's device or, if that is a GPU and too small, split by accelerate over
    this process's share of the node's GPUs, then host memory, then disk."""
    device = processes.device()
    if placement == "whole" or (placement == "stream" and device.type == "cpu"):
        return load().to(device)
    max_memory: dict[int | str, int] = {gpu: int(ROOM * torch.cuda.mem_get_info(gpu)[0]) for gpu in share.gpus}
    max_memory["cpu"] = int(ROOM * memory.free_gib(torch.device("cpu")) / share.holders * memory.GIB)
    return load(device_map="auto", max_memory=max_memory)


def batch_number(batch_size: int | str) -> int:
    """The batch size as a number: `BATCH` for `auto`."""
    return BATCH if batch_size == "auto" else batch_size


def find_batch_size(
    batch_size: int | str, logits: Callable[[list[Tensor]], Iterator[Tensor]], windows_NT: Tensor, share: Share
) -> int:
    """`batch_size`; for `auto` on GPUs the largest that fits all processes, found by trying, at most one process's share.
    Raises `torch.OutOfMemoryError` if not even one window fits."""
    if batch_size != "auto" or processes.device().type == "cpu":
        return batch_number(batch_size)
    most = min(LARGEST, -(-len(windows_NT) // share.of))

    @find_executable_batch_size(starting_batch_size=most)
    @torch.no_grad()
    def largest(batch_size: int) -> int:
        for _ in logits([windows_NT[:1].expand(batch_size, -1)]):
            torch.cuda.synchronize()
        return batch_size

    try:
        most = most if share.number == IDLE else largest()
    except RuntimeError as error:
        if "executable batch size" not in str(error):
            raise
        raise torch.OutOfMemoryError("not even one window fits") from error
    return int(processes.gather_rows(torch.tensor([most], device=processes.device())).min())
