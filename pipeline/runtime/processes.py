"""The process group: how it starts and ends, collectives, and the arguments with which a Trainer uses it."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from pipeline.runtime import cores, launcher, signals
from pipeline.runtime.errors import ReportedByPeer, Stopped, UserError, one_line
from pipeline.runtime.heartbeat import ERROR, Heartbeat
from pipeline.runtime.launcher import device, local_rank, local_world_size, nodes

CELL = "ESPALIER_CELL"  # the environment variable with the name of the cell of a sweep
EVERY = 30  # seconds between progress lines
LOST = re.compile(r"Connection (closed|reset)|Broken pipe|[Tt]imed out waiting|gloo/transport|ProcessGroup|NCCL")
_heartbeat: Heartbeat | None = None
_timeout = timedelta(minutes=30)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    # the group first: Lightning's teardown deletes the variable when it believes that it started the processes
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def several_nodes() -> bool:
    return world_size() > local_world_size()


def is_main() -> bool:
    return rank() == 0


@contextmanager
def together(timeout_minutes: float = 30, threads: int | None = None) -> Iterator[None]:
    """Joins the processes of the launcher into one group. A failure of one ends all, and only one of them reports it.

    Raises the failure in the process that reports it and `ReportedByPeer` in the others.
    """
    try:
        start(timeout_minutes, threads)
        yield
    except BaseException as error:
        settled = _settle(error, timeout_minutes)
        raise settled from (None if settled is error else error)
    finally:
        stop()


def start(timeout_minutes: float = 30, threads: int | None = None) -> None:
    """Joins the processes of the launcher into one group. Raises `UserError` for a wrong launch. `threads`: CPU threads of each
    process; None is its share of the cores."""
    global _heartbeat, _timeout
    launcher.check_launch()
    if world_size() > 1 and not dist.is_initialized():
        _timeout = timedelta(minutes=timeout_minutes)
        store, rank_, size = next(dist.rendezvous("env://", timeout=_timeout))
        # the cells of a sweep use the store of their launch one after the other
        store = dist.PrefixStore(os.environ.get(CELL, "run"), store)
        # another connection, because a wait on one blocks all its users
        _heartbeat = Heartbeat(store.clone(), rank_, size, local_rank(), int(os.environ.get("GROUP_RANK", 0)))
        launcher.set_device(store)  # after the heartbeat, which passes its failure on to all machines
        # Objects and waits use gloo, on the host: its time-out is an exception, NCCL's ends the process by SIGABRT
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
    """Leaves the group, when all are done or one has failed."""
    global _heartbeat
    if _heartbeat:
        _heartbeat.stop()
        _heartbeat = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _settle(error: BaseException, timeout_minutes: float) -> BaseException:
    """Settles which process reports why the run ends. Returns the exception to raise in this one."""
    signals.ignore_signals()
    if _heartbeat is None:
        return error if local_rank() == 0 else ReportedByPeer(_code(error))
    if isinstance(error, Stopped) or is_lost_peer(error):  # launchers signal the others when one process ends
        reason = _heartbeat.lost()
        if isinstance(reason, dict):
            _heartbeat.ending.acquire()  # or its thread, which sees the reason too, would report it once more
            return ReportedByPeer(_heartbeat.end_with(reason))
        if reason:
            error = UserError(reason)
        elif "imed out" in str(error):
            error = UserError(
                f"process {rank()} waited {timeout_minutes:g} minutes for one that is still working: set a longer "
                f"timeout_minutes ({one_line(error)[:200]})"
            )
    text = one_line(error) or type(error).__name__
    return error if _heartbeat.post(text, _code(error)) else ReportedByPeer(_code(error))


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is that of a collective in which another process is missing."""
    return isinstance(error, dist.DistError) or bool(LOST.search(str(error)))


def _code(error: BaseException) -> int:
    return signals.EXIT_CODE if isinstance(error, Stopped) else ERROR


def say(text: str) -> None:
    if is_main():
        print(text, flush=True)


def progress(prefix: str) -> Callable[[str], None]:
    """A function that prints `prefix` and its argument, on rank 0 and at most every `EVERY` seconds."""
    last, out = time.monotonic(), sys.stdout  # sys.stdout of now: it is redirected while lm-eval runs

    def report(text: str) -> None:
        nonlocal last
        if is_main() and time.monotonic() - last > EVERY:
            last = time.monotonic()
            print(prefix + text, file=out, flush=True)

    return report


def on_terminal() -> bool:
    """Whether to show progress bars: in a file each is one long line."""
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
    """Every rank's `value`, in the order of ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def share_of(count: int, tile: int = 1) -> slice:
    """This rank's part of `count` rows, in whole tiles; it may be empty. The first ranks have one tile more if the tiles do not
    divide evenly."""
    quotient, remainder = divmod(-(-count // tile), world_size())
    start = rank() * quotient + min(rank(), remainder)
    stop = start + quotient + (rank() < remainder)
    return slice(min(start * tile, count), min(stop * tile, count))


def gather_rows(mine: Tensor) -> Tensor:
    """The rows of all ranks, concatenated, on every rank; `mine` has those of this rank's `share_of`."""
    if world_size() == 1:
        return mine
    if mine.dtype == torch.bool:  # not every backend gathers bool
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


def trainer_arguments(
    sharded: Callable[[int, timedelta], Strategy] | None = None, plugins: Sequence[Any] = ()
) -> dict[str, Any]:
    """The arguments with which a Lightning Trainer uses exactly the launched processes: with DDP, or with the strategy that
    `sharded(processes, timeout)` returns.

    With devices="auto" each rank of a CPU launch would train alone; on GPUs the strategy names this process's. In a SLURM job
    Lightning would load any hpc_ckpt_*.ckpt in the working folder, such as another run's, and write one at SIGUSR1.
    """
    from pipeline.runtime import strategies  # which builds on this module

    gpu = torch.cuda.is_available()
    if world_size() == 1:
        strategy: Strategy = strategies.OneDevice(device())
    elif sharded:
        strategy = sharded(world_size(), _timeout)
    else:
        strategy = strategies.DataParallel(_timeout)
    in_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return {
        "plugins": [*plugins, *([SLURMEnvironment(auto_requeue=False)] if in_slurm else [])],
        "default_root_dir": os.devnull,
        "accelerator": "gpu" if gpu else "cpu",
        "devices": "auto" if gpu else local_world_size(),
        "num_nodes": nodes(),
        "strategy": strategy,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }
