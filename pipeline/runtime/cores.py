"""The number of CPU cores that this process may use. On a cluster that is rarely all cores of the machine."""

import math
import os
import socket
from pathlib import Path

import torch

LAUNCHED = ("RANK", "ACCELERATE_MIXED_PRECISION")  # set by the launchers


def allowed() -> set[int]:
    """The cores of the CPU affinity: `--cpus-per-task=4` of 128 cores gives four."""
    count = os.cpu_count() or 1
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(count))


def quota(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """The CPU limit of this process's control groups (containers), in cores; infinite without a limit."""
    lowest = math.inf
    try:
        groups = [line.split(":", 2)[1:] for line in membership.read_text().splitlines()]
    except OSError:
        return lowest
    for controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers and (root / controllers).is_dir() else root
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if base != group and base not in group.parents:
                break
            lowest = min(lowest, _limit(group))
    return lowest


def _limit(group: Path) -> float:
    try:
        if (file := group / "cpu.max").is_file():
            limit, period = file.read_text().split()
        else:
            limit, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if limit in ("max", "-1") else int(limit) / int(period)
    except (OSError, ValueError):
        return math.inf


def claim() -> tuple[str, str, list[int]]:
    """(host, control group, cores) of this process. Processes with the same values share these cores."""
    try:
        group = Path("/proc/self/cgroup").read_text()
    except OSError:
        group = ""
    return socket.gethostname(), group, sorted(allowed())


def share(claim: tuple[str, str, list[int]], claims: list[tuple[str, str, list[int]]], limit: float) -> int:
    """The whole cores for the process of `claim`, at least one. Each core, and the control group's `limit`, is divided
    evenly among the processes in `claims` that use it."""
    host, group, cores = claim
    local = [(other_group, other_cores) for other_host, other_group, other_cores in claims if other_host == host]
    users = {core: sum(core in other_cores for _, other_cores in local) for core in cores}
    members = sum(other_group == group for other_group, _ in local)
    installed = (os.cpu_count() or 1) / max(1, sum(set(other_cores) == set(cores) for _, other_cores in local))
    return max(1, int(min(round(sum(1 / users[core] for core in cores), 6), limit / members, installed)))


def set_threads(wanted: int | None, claims: list[tuple[str, str, list[int]]]) -> None:
    """Sets torch's thread count: `wanted` (the setting `threads`), else the user's OMP_NUM_THREADS, else this process's
    share of the cores.

    The launchers set OMP_NUM_THREADS=1 if the user did not set it, which would leave the other cores idle. Any other value
    was set by the user, and without a launcher so was 1. It is kept: OpenMP threads spin while they wait, and on a busy
    machine two threads were eight times slower than one.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
        return
    requested, launched = os.environ.get("OMP_NUM_THREADS"), any(name in os.environ for name in LAUNCHED)
    if requested is None or (launched and requested == "1"):
        torch.set_num_threads(share(claim(), claims, quota()))
