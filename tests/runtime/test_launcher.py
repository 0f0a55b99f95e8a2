"""The GPU of a process."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime import launcher
from pipeline.runtime.errors import UserError


@pytest.fixture
def node(monkeypatch):
    """Simulates a process on a GPU node, by its local rank, the processes per node, and the visible GPUs."""

    def simulate(local_rank: int, processes: int, gpus: int, uuid: str = "a") -> None:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))

    return simulate


def test_a_process_uses_its_only_visible_gpu_and_two_cannot_share_one(node):
    store = dist.HashStore()
    node(3, 8, 8)
    launcher.set_device(store)
    assert launcher.device() == torch.device("cuda", 3)
    for rank, uuid in enumerate("ab"):  # SLURM's --gpus-per-task=1
        node(rank, 2, 1, uuid)
        launcher.set_device(store)
        assert launcher.device() == torch.device("cuda", 0)
    node(2, 3, 1, "b")
    with pytest.raises(UserError, match="3 processes were started and .* has 1 GPUs: launch with --num_processes 1"):
        launcher.set_device(store)
    node(0, 4, 2)
    with pytest.raises(UserError, match=re.escape("has 2 GPUs: launch with --num_processes 2")):
        launcher.set_device(store)
