"""The number of CPU threads of a process: never more than its cores and its quota allow."""

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
        (None, {"OMP_NUM_THREADS": "2", "RANK": "0"}, 1),  # set by the user: torch's thread count is not changed
        (None, {}, 3),
        (2, {"OMP_NUM_THREADS": "1"}, 2),
    ],
)
def test_threads_are_the_users_setting_or_the_share_of_the_cores(monkeypatch, wanted, environ, threads):
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


def test_processes_on_a_machine_divide_the_cores_that_they_share(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    first, second = ("host1", "job", list(range(8))), ("host1", "job", list(range(8)))
    bound, remote = ("host1", "job", [8, 9]), ("host2", "job", [0, 1])
    assert cores.share(first, [first], math.inf) == 8
    assert cores.share(first, [first, second, bound, remote], math.inf) == 4  # torchrun: both may use all eight cores
    assert cores.share(bound, [first, second, bound, remote], math.inf) == 2  # no other process may use its cores
    assert cores.share(first, [first, second, remote], 3.0) == 1  # a container limited to three cores
    assert cores.share(first, [first], 0.5) == 1


def test_the_quota_is_the_lowest_of_the_control_groups(tmp_path):
    group = tmp_path / "cgroup/jobs/task"
    group.mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("0::/jobs/task\n")
    (group / "cpu.max").write_text("max 100000\n")
    assert cores.quota(membership, tmp_path / "cgroup") == math.inf
    (group.parent / "cpu.max").write_text("250000 100000\n")
    assert cores.quota(membership, tmp_path / "cgroup") == 2.5
    version_1 = tmp_path / "version_1/cpu,cpuacct/task"
    version_1.mkdir(parents=True)
    membership.write_text("5:memory:/task\n4:cpu,cpuacct:/task\n")
    (version_1 / "cpu.cfs_quota_us").write_text("400000\n")
    (version_1 / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.quota(membership, tmp_path / "version_1") == 4
    assert cores.quota(tmp_path / "absent") == math.inf
