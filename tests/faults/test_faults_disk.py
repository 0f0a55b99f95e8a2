"""Full, damaged and read-only disks give one-line messages, and nothing half-written counts as done."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from pipeline.runtime.errors import UserError
from pipeline.stages import space
from tests.conftest import PRUNE
from tests.faults import harm

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path):
    """A small tmpfs; `disk("size=1m")` remounts it with other options."""
    try:
        harm.disk("size=8k")(tmp_path)
    except PermissionError as error:
        pytest.skip(str(error))

    def change(options: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,{options}", tmp_path / "disk"], check=True)
        return tmp_path / "disk"

    yield change
    harm.undo(tmp_path)


def test_a_disk_that_fills_up_at_any_time(tiny_llama, whole_masks, tmp_path, disk, typed, monkeypatch):
    """The disk grows by 16 KiB per try: the run resumes each time, and fails with one line until there is enough room.

    The free space is hidden from the check before the run, as with quotas.
    """
    monkeypatch.setattr(space, "check", lambda *arguments: None)
    settings = (f"model={tiny_llama}", f"run_dir={tmp_path}/disk/run")
    unwritten = []
    for size in range(8, 800, 16):
        prune = disk(f"size={size}k") / "run/prune"
        code, _, lines = typed(*settings)
        assert prune.exists() == (code == 0)
        if code == 0:
            break
        assert code == 2 and len(lines) == 1
        unwritten.append(re.search(r"cannot write \S*/run/\.prune/(\S+): .*No space left on device", lines[0])[1])
    assert (prune / "masks.safetensors").read_bytes() == whole_masks
    shards = [name for name in dict.fromkeys(unwritten) if re.search(r"\d.*\.safetensors", name)]  # of one block each
    assert len(shards) >= 3 and shards == sorted(shards, key=lambda name: int(re.search(r"\d+", name)[0]))
    files = {path.name for path in prune.rglob("*")}
    assert {"stage.json", "layers.csv", "config.json", "tokenizer.json"} < files
    assert not [name for name in files if name.endswith(".part")]


def test_too_little_disk_space_is_reported_before_any_work(tiny_llama, tmp_path, disk, refused, finishes):
    run_dir = disk("size=200k") / "run"
    line = refused(run_dir, f"model={tiny_llama}")
    assert re.search(
        r"prune needs about 0\.\d+ MiB more on the disk of .*, where 0\.\d+ MiB are free: free some space", line
    )
    assert not list(run_dir.glob(".prune/model"))
    disk("size=1m")
    finishes(run_dir, f"model={tiny_llama}")


def test_a_full_disk_at_a_checkpoint(tiny_llama, tmp_path, disk, typed, monkeypatch):
    monkeypatch.setattr(space, "check", lambda *arguments: None)
    settings = (f"model={tiny_llama}", f"run_dir={tmp_path}/disk/run", "stages=[prune,finetune]", "finetune.rank=64")
    disk("size=600k")
    code, _, lines = typed(*settings)
    assert code == 2 and len(lines) == 1
    assert re.search(r"cannot write \S*/\.finetune/checkpoints/step=\d.ckpt: ", lines[0]), lines
    disk("size=4m")
    assert typed(*settings)[0] == 0


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch.py", *PRUNE, f"model={tmp_path}", f"run_dir={tmp_path}", "debug=true"])
    with pytest.raises(UserError, match="no config.json"):
        launch.main()
    assert os.listdir(tmp_path) == []
