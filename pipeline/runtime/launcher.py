"""This process's place among the launched ones, from the environment variables of the launcher, and its device."""

import os
import socket

import torch

from pipeline.runtime.errors import UserError


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def nodes() -> int:
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


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
    if nodes() > 1 and size != nodes() * local_world_size():
        raise UserError(
            f"{nodes()} machines and {size} processes were requested, {local_world_size()} of them here: launch the same "
            "number of processes on each machine, with torchrun --nproc_per_node=N, or with accelerate launch "
            "--num_processes=TOTAL for all machines together"
        )


def set_device() -> None:
    if torch.cuda.is_available():
        if local_world_size() > torch.cuda.device_count():
            raise UserError(
                f"{local_world_size()} processes were started and {socket.gethostname()} has {torch.cuda.device_count()} "
                f"GPUs: launch with --num_processes {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device())
    elif "OMP_NUM_THREADS" not in os.environ or {"RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        # Launchers set OMP_NUM_THREADS=1, which would leave the other cores idle. Without a launcher the user has set it, and
        # it counts: threads spin while they wait, and on a busy machine two were eight times slower than one.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size()))
