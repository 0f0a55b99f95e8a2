"""Every bad input gives a one-line message, a failing exit code and no traceback, and leaves a finished run unchanged.

    python -m tests.faults.test_bad_inputs > benchmarks/BAD_INPUTS.md

The cases are in bad_inputs.py. Disks that fill up are in test_faults_disk.py, processes in test_faults_processes.py, formats
of model folders in test_faults_model.py, signals in test_resume.py.
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
from tests.faults.bad_commands import DAMAGED_FILES
from tests.faults.bad_inputs import CASES
from tests.faults.cases import Case
from tests.faults.harm import flip, undo
from tests.faults.test_faults_processes import LOST, lose_process

pytestmark = pytest.mark.slow


def typed(*words: str) -> tuple[int, str, list[str]]:
    """The exit code, the whole output, and our lines on stderr."""
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
    """Writes a model and a finished run of it."""
    make_tiny_llama(here / "model")
    assert typed(*settings(here))[0] == 0


def content(folder: Path) -> dict[str, bytes]:
    """The content of all files of finished stages."""
    paths = (
        path for path in folder.rglob("*") if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def run_case(case: Case, here: Path) -> tuple[int, str, list[str]]:
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
def test_bad_input_is_a_one_line_error_and_changes_nothing(case, here, capfd):
    try:
        if case.harm:
            case.harm(here)
    except PermissionError as error:
        pytest.skip(str(error))
    before = content(here / "run")
    code, output, lines = run_case(case, here)
    assert code == 2 and len(lines) == 1, output[-3000:]
    assert case.says.replace("{here}", str(here)) in lines[0], lines[0]
    seen = output + "".join(capfd.readouterr())
    assert "Traceback" not in seen and "bug in Espalier" not in seen
    assert content(here / "run") == before
    assert not list(here.glob("new*")) and not list(here.rglob("traceback*"))


def after_damage(stage: str, file: str, here: Path) -> tuple[int, str, list[str]]:
    file, _, word = file.partition(": ")
    flip(here / "run" / stage / file, word.encode() or 0.5)
    code, output, _ = typed(*settings(here))
    return (
        code,
        output,
        [line for line in output.splitlines() if f"{stage}: {here}/run/{stage}/{file} is damaged" in line],
    )


@pytest.mark.parametrize(("stage", "file"), DAMAGED_FILES)
def test_a_changed_byte_is_named_and_only_its_stage_runs_again(stage, file, finished):
    here, before = finished, content(finished / "run")
    code, output, named = after_damage(stage, file, here)
    assert code == 0 and len(named) == 1, output
    now = content(here / "run")
    assert now.keys() == before.keys()
    made_again = {name for name in before if now[name] != before[name]}
    assert all(name.startswith(f"{stage}/") and not name.endswith(".safetensors") for name in made_again), made_again


def test_every_changed_byte_of_stage_json_is_detected(finished, tmp_path):
    about = checksums.read(finished / "run/prune")
    content = (finished / "run/prune/stage.json").read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "stage.json").write_bytes(damaged)
        assert checksums.read(tmp_path) in (None, about), f"byte {place}"


def main() -> None:
    print("# Bad inputs and their messages\n")
    print(
        "Made by `python -m tests.faults.test_bad_inputs`; each row is a test. The message is the one line that is printed"
    )
    print("after `espalier: `. The exit code is 2, and a finished run in the same folder is unchanged.\n")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        make(base)
        here = Path(folder) / "here"
        for part, cases in CASES.items():
            print(f"## {part}\n\n| command line | damage | message |\n| --- | --- | --- |")
            for case in cases:
                shutil.rmtree(here, ignore_errors=True)
                shutil.copytree(base, here, ignore=shutil.ignore_patterns(".measured"))
                if case.harm:
                    case.harm(here)
                _, _, (line,) = run_case(case, here)
                undo(here)
                _row(here, f"`{case.typed}`" if case.typed else "", case.harmed, line)
            print()
        print("## A changed byte in a finished run\n\nThe exit code is 0: the stage runs again.\n")
        print("| file | message |\n| --- | --- |")
        for stage, file in DAMAGED_FILES:
            _, _, (line,) = after_damage(stage, file, base)
            _row(base, f"`{stage}/{file.replace(': ', '`, in the word `')}`", line)
        print("\n## A lost process, of two on two machines\n\n| signal, process | exit codes | message |")
        print("| --- | --- | --- |")
        heartbeat.BEAT, heartbeat.MISSED = 0.4, 5
        for name, number, *_ in LOST:
            there = Path(tempfile.mkdtemp(dir=folder))
            codes, output, _ = lose_process(there, name, number)
            _row(
                there,
                f"{name}, {number}",
                ", ".join(map(str, codes)),
                *[line for lines in output for line in lines][:1],
            )


def _row(here: Path, *cells: str) -> None:
    row = " | ".join(cell.removeprefix("espalier: ").replace("|", "\\|").replace("\n", " ") for cell in cells)
    row = re.sub(r"\.\d+\.part", ".PID.part", row)
    print(f"| {row} |".replace(str(here), "HERE").replace("{here}", "HERE").replace(str(Path.cwd()), "."))


if __name__ == "__main__":
    main()
