"""Rank, world size and device of this process, from the launcher's environment variables."""

import os
import socket

import torch
import torch.distributed as dist

from pipeline.runtime.errors import UserError


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def nodes() -> int:
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def device() -> torch.device:
    """This process's GPU, or the CPU. If only one GPU is visible (SLURM's --gpus-per-task=1), it is used at any local rank."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else local_rank())


def check_launch() -> None:
    """Raises `UserError` for a wrong launch; uses only the environment, so all processes agree."""
    if "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ:
        # without a GPU, `accelerate launch [--cpu] --num_processes 2` silently starts a single process
        raise UserError(
            "several processes were requested and the launcher started one: on a host without GPUs run "
            "`accelerate launch --multi_gpu --num_processes N launch.py ...` (without --cpu)"
        )
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and "RANK" not in os.environ:
        raise UserError(
            f"srun started {tasks} tasks that are not connected: run `srun --ntasks-per-node=1 torchrun "
            "--nnodes=$SLURM_NNODES --nproc_per_node=GPUS ... launch.py ...`"
        )
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and "LOCAL_WORLD_SIZE" not in os.environ:  # as by deepspeed, or srun with RANK set by hand
        raise UserError(
            f"{size} processes were started by a launcher that does not set LOCAL_WORLD_SIZE: launch with torchrun or "
            "accelerate launch, or set it to the number of processes on each machine"
        )
    if nodes() > 1 and size != nodes() * local_world_size():
        raise UserError(
            f"{nodes()} machines and {size} processes were requested, {local_world_size()} of them here: launch the same "
            "number of processes on each machine, with torchrun --nproc_per_node=N, or with accelerate launch "
            "--num_processes=TOTAL for all machines together"
        )


def set_device(store: dist.Store | None = None) -> None:
    """Makes `device()` the current CUDA device. `store`: the key-value store of the launch, used to find processes with the
    same GPU. Raises `UserError` if there are fewer GPUs than processes."""
    if not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if local_world_size() > count > 1 or (count == 1 and store is not None and _is_taken(store)):
        raise UserError(
            f"{local_world_size()} processes were started and {socket.gethostname()} has {count} "
            f"GPUs: launch with --num_processes {count}"
        )
    torch.cuda.set_device(device())
    # containers turn TF32 on by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE; its 10 bits are too few for Gram matrices
    torch.set_float32_matmul_precision("highest")


def _is_taken(store: dist.Store) -> bool:
    """Whether another process has registered this process's only GPU."""
    return store.add(f"gpu/{socket.gethostname()}/{torch.cuda.get_device_properties(0).uuid}", 1) > 1
