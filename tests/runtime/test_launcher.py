"""The GPU of a process, and a SLURM job around it."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime import launcher
from pipeline.runtime.errors import UserError
from tests.conftest import QUICK


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


@pytest.mark.slow
def test_a_slurm_job_loads_no_checkpoint_of_another_run(tiny_llama, tmp_path, monkeypatch, typed):
    """Lightning writes such a file to the working folder, and loads it into whatever runs there next."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}}, "hpc_ckpt_1.ckpt")
    job = {"JOB_ID": "7", "JOB_NAME": "x", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "a"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert typed(*QUICK, f"model={tiny_llama}", "run_dir=run", "stages=[prune,finetune]")[0] == 0
