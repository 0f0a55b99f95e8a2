"""All written files and folders have the mode of the user's umask."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from pipeline.runtime import files, lock
from tests.conftest import QUICK, ROOT

SMALL = (
    *QUICK,
    *(
        "pretrain.steps=2",
        "pretrain.batch_size=2",
        "calibration.samples=4",
        "reconstruct.epochs=1",
        "reconstruct.accumulate=1",
    ),
    *("finetune.max_steps=2", "evaluate.windows=2", "evaluate.continuations=0"),
)
ALL = "stages=[pretrain,prune,reconstruct,finetune,evaluate,report]"


@pytest.fixture(params=[0o027, 0o002], ids=oct)
def umask(request, monkeypatch):
    monkeypatch.setattr(files, "UMASK", request.param)  # read when the command starts
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check(folder: Path, umask: int) -> None:
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    assert sum(path.suffix == ".safetensors" for path in paths) >= 2
    wrong = {
        str(path.relative_to(folder)): oct(mode)
        for path in paths
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong


@pytest.fixture
def typed(monkeypatch):
    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, arguments)])
        assert launch.main() == 0

    return run


@pytest.mark.slow
def test_files_of_a_run_and_of_commands_follow_the_umask(umask, typed, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    stages = ALL if umask == 0o027 else "stages=[pretrain,prune]"
    typed(*SMALL, stages, f"run_dir={folder}/run")
    if stages == ALL:
        typed(*SMALL, stages, f"run_dir={folder}/plain", "finetune.method=plain_lora")
        typed("compare", folder / "run", folder / "plain", f"out={folder}")
    dense, masks = folder / "run/pretrain/model", folder / "run/prune/masks.safetensors"
    typed("apply", dense, masks, folder / "applied")
    typed("export", folder / "run/prune/model", masks, folder / "compact")
    typed("expand", folder / "compact", folder / "expanded")
    check(folder, umask)


def test_reading_the_umask_does_not_change_it(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from safetensors.numpy import save_file; import numpy\n"
        "from pipeline.runtime import files\n"
        "with files.atomic_write(Path(sys.argv[1])) as tmp: save_file({'a': numpy.ones(1)}, tmp)\n"
        "assert os.umask(0) == files.UMASK\n"
    )
    for umask in (0o022, 0o027, 0o077):
        path = tmp_path / f"{umask}.safetensors"
        subprocess.run(
            [sys.executable, "-c", code, path], cwd=ROOT, check=True, preexec_fn=lambda mask=umask: os.umask(mask)
        )
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_lock_follows_the_umask(umask, tmp_path):
    with lock.held(tmp_path):
        assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) == 0o666 & ~umask


def test_a_set_group_id_folder_keeps_its_bit(umask, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2775)
    (tmp_path / "shared/file").write_text("")
    files.apply_umask(tmp_path)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o2775
