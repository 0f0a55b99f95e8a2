"""Owns the group of processes: how it forms and ends, what they tell each other, and what the Trainer is told of it."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from pipeline.runtime import cores, launcher, signals
from pipeline.runtime.errors import ReportedByPeer, Stopped, UserError, one_line
from pipeline.runtime.heartbeat import ERROR, Heartbeat
from pipeline.runtime.launcher import device, local_rank, local_world_size, nodes

CELL = "ESPALIER_CELL"  # the variable by which `sweep` tells which cell this is
EVERY = 30  # seconds between progress lines
LOST = re.compile(r"Connection (closed|reset)|Broken pipe|[Tt]imed out waiting|gloo/transport|ProcessGroup|NCCL")
_heartbeat: Heartbeat | None = None
_timeout = timedelta(minutes=30)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    # Lightning's teardown deletes the variable where it thinks that it started the processes; the group stays
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def several_nodes() -> bool:
    return world_size() > local_world_size()


def is_main() -> bool:
    return rank() == 0


@contextmanager
def together(timeout_minutes: float = 30, threads: int | None = None) -> Iterator[None]:
    """Inside, the processes of the launcher are one group; a failure of one ends all, and only one says why.

    Raises what one process raises alone; where another process says why, `ReportedByPeer`.
    """
    try:
        start(timeout_minutes, threads)
        yield
    except BaseException as error:
        raised = _to_say(error, timeout_minutes)
        raise raised from (None if raised is error else error)
    finally:
        stop()


def start(timeout_minutes: float = 30, threads: int | None = None) -> None:
    """Joins the processes of the launcher into one group; refuses a launch that is not what was asked for. `threads`: of the
    CPU, for each process; None is its share."""
    global _heartbeat, _timeout
    launcher.refuse_another()
    if world_size() > 1 and not dist.is_initialized():
        _timeout = timedelta(minutes=timeout_minutes)
        store, rank_, size = next(dist.rendezvous("env://", timeout=_timeout))
        # the cells of a sweep meet one after the other in the one store of their launch
        store = dist.PrefixStore(os.environ.get(CELL, "run"), store)
        # a connection of its own, for a wait on one blocks all that use it
        _heartbeat = Heartbeat(store.clone(), rank_, size, local_rank(), int(os.environ.get("GROUP_RANK", 0)))
        launcher.set_device(store)  # whose failure on one machine is now heard of on all
        # Objects and waits go by gloo, on the host: NCCL's time-out ends the process by SIGABRT, gloo's is an exception
        backend = {"backend": "gloo"}
        if torch.cuda.is_available():
            backend = {"backend": "cpu:gloo,cuda:nccl", "device_id": device()}
        dist.init_process_group(
            **backend, store=dist.PrefixStore("espalier", store), rank=rank_, world_size=size, timeout=_timeout
        )
    else:
        launcher.set_device()
    cores.set_threads(threads, all_ranks(cores.claim()))


def stop() -> None:
    """Leaves the group, in which all are done or one has failed."""
    global _heartbeat
    if _heartbeat:
        _heartbeat.stop()
        _heartbeat = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _to_say(error: BaseException, timeout_minutes: float) -> BaseException:
    """The exception that this process shall raise, once it is settled which process says why the run ends."""
    signals.ignore_signals()
    if _heartbeat is None:
        return error if local_rank() == 0 else ReportedByPeer(_code(error))
    if isinstance(error, Stopped) or is_of_a_lost_peer(error):
        # (a signal may be the launcher's, which ends the others once it has seen one die)
        reason = _heartbeat.lost()
        if isinstance(reason, dict):
            return ReportedByPeer(_heartbeat.end_with(reason))
        if reason:
            error = UserError(reason)
        elif "imed out" in str(error):
            error = UserError(
                f"process {rank()} waited {timeout_minutes:g} minutes for one that is still at work: set a longer "
                f"timeout_minutes ({one_line(error)[:200]})"
            )
    text = one_line(error) or type(error).__name__
    return error if _heartbeat.post(text, _code(error)) else ReportedByPeer(_code(error))


def is_of_a_lost_peer(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or bool(LOST.search(str(error)))


def _code(error: BaseException) -> int:
    return signals.EXIT_CODE if isinstance(error, Stopped) else ERROR


def say(text: str) -> None:
    if is_main():
        print(text, flush=True)


def progress(beginning: str) -> Callable[[str], None]:
    """A function that prints `beginning` and what it is given, on rank 0 and at most every `EVERY` seconds."""
    last, out = time.monotonic(), sys.stdout  # kept, as lm-eval's output is redirected

    def report(text: str) -> None:
        nonlocal last
        if is_main() and time.monotonic() - last > EVERY:
            last = time.monotonic()
            print(beginning + text, file=out, flush=True)

    return report


def on_terminal() -> bool:
    """Whether somebody watches: elsewhere a progress bar is one long line."""
    return is_main() and sys.stdout.isatty()


def barrier() -> None:
    """Waits for all on the host, so that a wait that is too long is an exception (`dist.barrier` would wait by NCCL)."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def all_sum(tensor: Tensor) -> Tensor:
    """Sums `tensor` over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any rank."""
    return bool(all_sum(torch.tensor(int(flag))).item()) if world_size() > 1 else flag


def all_ranks(value: Any) -> list[Any]:
    """Every rank's `value`, in their order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def share_of(count: int, tile: int = 1) -> slice:
    """This rank's part of `count` rows: equal parts of whole tiles, the first ones a tile longer; it may be empty."""
    each, more = divmod(-(-count // tile), world_size())
    start = rank() * each + min(rank(), more)
    return slice(min(start * tile, count), min((start + each + (rank() < more)) * tile, count))


def gather_rows(mine: Tensor) -> Tensor:
    """All ranks' rows, end to end, on every rank; each brings those of its `share_of`."""
    if world_size() == 1:
        return mine
    if mine.dtype == torch.bool:  # which not every backend gathers
        return gather_rows(mine.to(torch.uint8)).bool()
    lengths = [0] * world_size()
    dist.all_gather_object(lengths, len(mine))
    padded = torch.zeros((max(lengths), *mine.shape[1:]), dtype=mine.dtype, device=mine.device)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths)])


def from_main(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def trainer_arguments(sharded: Callable[[int, timedelta], Strategy] | None = None) -> dict[str, Any]:
    """What a Lightning Trainer must be told to use exactly the processes that are here: by DDP, or by the strategy that
    `sharded(processes, timeout)` makes.

    With devices="auto" each rank of a CPU launch would train alone; on GPUs the strategy names this process's.
    """
    from pipeline.runtime import strategies  # which builds on this module

    gpu = torch.cuda.is_available()
    if world_size() == 1:
        strategy: Strategy = strategies.OneDevice(device())
    elif sharded:
        strategy = sharded(world_size(), _timeout)
    else:
        strategy = strategies.DataParallel(_timeout)
    return {
        "accelerator": "gpu" if gpu else "cpu",
        "devices": "auto" if gpu else local_world_size(),
        "num_nodes": nodes(),
        "strategy": strategy,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }
