"""Owns how many CPU cores this process may use, which on a cluster is rarely all that the machine has."""

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


def quota(about: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the control groups of this process allow, as containers set; infinite without a limit."""
    lowest = math.inf
    try:
        groups = [line.split(":", 2)[1:] for line in about.read_text().splitlines()]
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
            most, period = file.read_text().split()
        else:
            most, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if most in ("max", "-1") else int(most) / int(period)
    except (OSError, ValueError):
        return math.inf


def claim() -> tuple[str, str, list[int]]:
    """What this process may use: its machine, its control group, its cores. Processes with the same share them."""
    try:
        group = Path("/proc/self/cgroup").read_text()
    except OSError:
        group = ""
    return socket.gethostname(), group, sorted(allowed())


def share(mine: tuple[str, str, list[int]], claims: list[tuple[str, str, list[int]]], limit: float) -> int:
    """Whole cores for this process, at least one: each core, and the group's `limit`, is divided among those that use it."""
    host, group, cores = mine
    here = [theirs for theirs in claims if theirs[0] == host]
    users = {core: sum(core in theirs[2] for theirs in here) for core in cores}
    members = sum(theirs[1] == group for theirs in here)
    count = (os.cpu_count() or 1) / max(1, sum(set(theirs[2]) == set(cores) for theirs in here))
    return max(1, int(min(round(sum(1 / users[core] for core in cores), 6), limit / members, count)))


def set_threads(wanted: int | None, claims: list[tuple[str, str, list[int]]]) -> None:
    """Sets the threads of torch: `wanted` (the setting `threads`), else what the user's OMP_NUM_THREADS says, else this
    process's share of the cores.

    The launchers set OMP_NUM_THREADS=1 where the user did not, which would leave the other cores idle. Any other value is
    the user's, and without a launcher 1 is as well: on a busy machine two threads, which spin while they wait, were eight
    times slower than one.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
        return
    given, launched = os.environ.get("OMP_NUM_THREADS"), any(name in os.environ for name in LAUNCHED)
    if given is None or (launched and given == "1"):
        torch.set_num_threads(share(claim(), claims, quota()))
