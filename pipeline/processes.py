"""Owns the processes: what the launcher started, the process group, and what the Trainer is told of them."""

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from pipeline.errors import UserError

TIMEOUT = timedelta(minutes=30)
CELL = "ESPALIER_CELL"  # the variable by which `sweep` tells which cell this is


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    # Lightning's teardown deletes the variable where it thinks that it started the processes; the group stays
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def start() -> None:
    """Joins the processes of the launcher into one group; refuses a launch that is not what was asked for."""
    if "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ:
        # without a GPU, `accelerate launch [--cpu] --num_processes 2` quietly starts a single process
        raise UserError(
            "several processes were asked for and the launcher started one: on a host without GPUs type "
            "`accelerate launch --multi_gpu --num_processes N launch.py ...` (without --cpu)"
        )
    if torch.cuda.is_available():
        if local_world_size() > torch.cuda.device_count():
            raise UserError(
                f"{local_world_size()} processes were started and this machine has {torch.cuda.device_count()} GPUs: "
                f"type --num_processes {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device())
    else:
        # the launchers set OMP_NUM_THREADS=1, which would leave the other cores idle
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size()))
    if world_size() > 1 and not dist.is_initialized():
        store, rank_, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # the cells of a sweep meet one after the other in the one store of their launch
        store = dist.PrefixStore(os.environ.get(CELL, "run"), store)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank_, world_size=size, timeout=TIMEOUT)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def say(text: str) -> None:
    if is_main():
        print(text, flush=True)


def on_terminal() -> bool:
    """Whether somebody watches: elsewhere a progress bar is one long line."""
    return is_main() and sys.stdout.isatty()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_sum(tensor: Tensor) -> Tensor:
    """Sums `tensor` over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_ranks(value: Any) -> list[Any]:
    """Every rank's `value`, in their order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def share_of(count: int) -> slice:
    """This rank's part of `count` rows: equal parts, the first ones a row longer."""
    each, more = divmod(count, world_size())
    start = rank() * each + min(rank(), more)
    return slice(start, start + each + (rank() < more))


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


def trainer_arguments(strategy: str = "ddp") -> dict[str, Any]:
    """What a Lightning Trainer must be told to use exactly the processes that are here; `strategy`: ddp or fsdp.

    With devices="auto" each rank of a CPU launch would train alone.
    """
    several: Any = "auto"
    if world_size() > 1 and strategy == "fsdp":
        from pipeline.sharding import ShardedStrategy

        several = ShardedStrategy(world_size(), TIMEOUT)
    elif world_size() > 1:
        # every rank's buffers are made from the same files and steps: nothing to broadcast before each forward
        several = DDPStrategy(timeout=TIMEOUT, broadcast_buffers=False)
    return {
        "accelerator": "gpu" if torch.cuda.is_available() else "cpu",
        "devices": local_world_size(),
        "num_nodes": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        "strategy": several,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }
