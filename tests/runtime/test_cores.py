"""How many threads a process takes: never more than its task was given."""

import math
import os

import pytest
import torch

from pipeline.runtime import cores


@pytest.mark.parametrize(
    "wanted, environ, threads",
    [
        (None, {"OMP_NUM_THREADS": "1"}, 1),
        (None, {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 3),  # the launcher's default
        (None, {"OMP_NUM_THREADS": "2", "RANK": "0"}, 1),  # the user's: what torch made of it stays
        (None, {}, 3),
        (2, {"OMP_NUM_THREADS": "1"}, 2),
    ],
)
def test_threads_are_the_users_word_or_the_share_of_the_cores(monkeypatch, wanted, environ, threads):
    for name in ("RANK", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6})
    monkeypatch.setattr(cores, "quota", lambda: math.inf)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        cores.set_threads(wanted, [cores.claim()])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_processes_of_a_machine_divide_the_cores_that_they_share(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    mine, same = ("here", "job", [0, 1, 2, 3, 4, 5, 6, 7]), ("here", "job", [0, 1, 2, 3, 4, 5, 6, 7])
    bound, away = ("here", "job", [8, 9]), ("there", "job", [0, 1])
    assert cores.share(mine, [mine], math.inf) == 8
    assert cores.share(mine, [mine, same, bound, away], math.inf) == 4  # torchrun: all have the task's cores
    assert cores.share(bound, [mine, same, bound, away], math.inf) == 2  # a task of its own: its cores are its alone
    assert cores.share(mine, [mine, same, away], 3.0) == 1  # a container with the time of three cores
    assert cores.share(mine, [mine], 0.5) == 1


def test_the_quota_is_the_lowest_of_the_control_groups(tmp_path):
    group = tmp_path / "cgroup/jobs/mine"
    group.mkdir(parents=True)
    about = tmp_path / "about"
    about.write_text("0::/jobs/mine\n")
    (group / "cpu.max").write_text("max 100000\n")
    assert cores.quota(about, tmp_path / "cgroup") == math.inf
    (group.parent / "cpu.max").write_text("250000 100000\n")
    assert cores.quota(about, tmp_path / "cgroup") == 2.5
    old = tmp_path / "old/cpu,cpuacct/mine"
    old.mkdir(parents=True)
    about.write_text("5:memory:/mine\n4:cpu,cpuacct:/mine\n")
    (old / "cpu.cfs_quota_us").write_text("400000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.quota(about, tmp_path / "old") == 4
    assert cores.quota(tmp_path / "absent") == math.inf
