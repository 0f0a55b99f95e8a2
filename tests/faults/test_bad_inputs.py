"""The table of bad inputs: each gets one line, a failing exit code and no traceback, and a finished run beside it is as it was.

    python -m tests.faults.test_bad_inputs > benchmarks/BAD_INPUTS.md

The cases are in bad_inputs.py. What needs more than a command typed at a finished run stands elsewhere: disks that fill on
the way in test_faults_disk.py, processes in test_faults_processes.py, forms of model folders in test_faults_model.py, signals
in test_resume.py.
"""

import contextlib
import io
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

import launch
from pipeline.runtime import checksums, heartbeat
from tests.conftest import QUICK, make_tiny_llama
from tests.faults.bad_inputs import CASES, DAMAGED_FILES, Case
from tests.faults.harm import flip, undo
from tests.faults.test_faults_processes import GONE, gone

pytestmark = pytest.mark.slow


def typed(*words: str) -> tuple[int, str, list[str]]:
    """The exit code, all that was said, and the lines of ours on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["launch.py", *words])
        code = launch.main()
    lines = [line for line in err.getvalue().splitlines() if line.startswith("espalier: ")]
    return code, out.getvalue() + err.getvalue(), lines


def settings(here: Path) -> list[str]:
    stages = "stages=[prune,finetune,export,evaluate,report]"
    return [*QUICK, stages, "evaluate.continuations=0", f"model={here}/model", f"run_dir={here}/run"]


def make(here: Path) -> None:
    """A model and a finished run of it."""
    make_tiny_llama(here / "model")
    assert typed(*settings(here))[0] == 0


def content(folder: Path) -> dict[str, bytes]:
    """Of all files that finished stages wrote."""
    paths = (
        path for path in folder.rglob("*") if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def answer(case: Case, here: Path) -> tuple[int, str, list[str]]:
    words = shlex.split(case.typed)
    words = [word.replace("{here}", str(here)) for word in words]
    return (
        typed(*words)
        if words[:1] in (["compare"], ["verify"], ["apply"], ["speed"])
        else typed(*settings(here), *words)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    here = tmp_path_factory.mktemp("finished")
    make(here)
    return here


@pytest.fixture
def here(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "here", ignore=shutil.ignore_patterns(".measured"))
    yield folder
    undo(folder)


ROWS = [(f"{part}: {case.typed or case.harmed}", case) for part, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("case", [case for _, case in ROWS], ids=[name for name, _ in ROWS])
def test_the_answer_is_one_line_and_nothing_is_lost(case, here, capfd):
    try:
        if case.harm:
            case.harm(here)
    except PermissionError as error:
        pytest.skip(str(error))
    before = content(here / "run")
    code, said, lines = answer(case, here)
    assert code == 2 and len(lines) == 1, said[-3000:]
    assert case.says.replace("{here}", str(here)) in lines[0], lines[0]
    seen = said + "".join(capfd.readouterr())
    assert "Traceback" not in seen and "fault of Espalier" not in seen
    assert content(here / "run") == before
    assert not list(here.glob("new*")) and not list(here.rglob("traceback*"))


def after_damage(stage: str, file: str, here: Path) -> tuple[int, str, list[str]]:
    file, _, word = file.partition(": ")
    flip(here / "run" / stage / file, word.encode() or 0.5)
    code, said, _ = typed(*settings(here))
    return code, said, [line for line in said.splitlines() if f"{stage}: {here}/run/{stage}/{file} is damaged" in line]


@pytest.mark.parametrize(("stage", "file"), DAMAGED_FILES)
def test_a_byte_that_changed_is_named_and_its_stage_alone_made_again(stage, file, finished):
    here, before = finished, content(finished / "run")
    code, said, named = after_damage(stage, file, here)
    assert code == 0 and len(named) == 1, said
    now = content(here / "run")
    assert now.keys() == before.keys()
    made_again = {name for name in before if now[name] != before[name]}
    assert all(name.startswith(f"{stage}/") and not name.endswith(".safetensors") for name in made_again), made_again


def test_no_byte_of_stage_json_changes_unseen(finished, tmp_path):
    about = checksums.read(finished / "run/prune")
    content = (finished / "run/prune/stage.json").read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "stage.json").write_bytes(damaged)
        assert checksums.read(tmp_path) in (None, about), f"byte {place}"


def main() -> None:
    print("# Bad inputs and their answers\n")
    print(
        "Made by `python -m tests.faults.test_bad_inputs`; each row is a test. Each answer is the one line that is said, after"
    )
    print("`espalier: `; the exit code is 2, and a finished run in the same folder is to the byte as it was.\n")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        make(base)
        here = Path(folder) / "here"
        for part, cases in CASES.items():
            print(f"## {part}\n\n| typed | damaged | answer |\n| --- | --- | --- |")
            for case in cases:
                shutil.rmtree(here, ignore_errors=True)
                shutil.copytree(base, here, ignore=shutil.ignore_patterns(".measured"))
                if case.harm:
                    case.harm(here)
                _, _, (line,) = answer(case, here)
                undo(here)
                _row(here, f"`{case.typed}`" if case.typed else "", case.harmed, line)
            print()
        print("## A byte of a finished run that changed\n\nThe exit code is 0: the stage is made again.\n")
        print("| file | answer |\n| --- | --- |")
        for stage, file in DAMAGED_FILES:
            _, _, (line,) = after_damage(stage, file, base)
            _row(base, f"`{stage}/{file.replace(': ', '`, in the word `')}`", line)
        print("\n## A process that is gone, of two on two machines\n\n| signal, process | exit codes | answer |")
        print("| --- | --- | --- |")
        heartbeat.BEAT, heartbeat.MISSED = 0.4, 5
        for name, number, *_ in GONE:
            there = Path(tempfile.mkdtemp(dir=folder))
            codes, said, _ = gone(there, name, number)
            _row(
                there, f"{name}, {number}", ", ".join(map(str, codes)), *[line for lines in said for line in lines][:1]
            )


def _row(here: Path, *cells: str) -> None:
    row = " | ".join(cell.removeprefix("espalier: ").replace("|", "\\|").replace("\n", " ") for cell in cells)
    row = re.sub(r"\.\d+\.part", ".PID.part", row)
    print(f"| {row} |".replace(str(here), "HERE").replace("{here}", "HERE").replace(str(Path.cwd()), "."))


if __name__ == "__main__":
    main()
