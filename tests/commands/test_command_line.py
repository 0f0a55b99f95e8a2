"""Commands of the command line other than runs: help, version, lists, plan; they are fast and write nothing."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest

from pipeline.commands import keys
from pipeline.commands.main import COMMANDS, main
from pipeline.runtime.errors import UserError
from pipeline.runtime.versions import LIBRARIES
from pipeline.settings import recipe_files, schema
from tests.conftest import QUICK, ROOT

SECTIONS = [f.name for f in dataclasses.fields(schema.Recipe) if dataclasses.is_dataclass(f.type)]


@pytest.fixture
def asked(capsys):
    def ask(*arguments, code=0) -> str:
        assert main(list(map(str, arguments))) == code
        seen = capsys.readouterr()
        return seen.out if code == 0 else seen.err

    return ask


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_command(asked, option):
    output = asked(option)
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", output, flags=re.M)
    assert asked("recipe=tiny", option) == output


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_own_help(asked, command):
    assert f" {command}" in asked(command, "--help")


def test_version(asked):
    libraries = ", ".join(rf"{name} \d\S*" for name in LIBRARIES)
    assert re.fullmatch(rf"espalier \S+ \(Python 3\.\S+, {libraries}\)", asked("--version").strip())


@pytest.mark.slow
def test_recipes_lists_all_recipes(asked):
    lines = asked("recipes").splitlines()
    assert lines[0].split() == ["recipe", "model", "sparsity", "stages"]
    assert [line.split()[0] for line in lines[1:]] == recipe_files.available()
    assert any(line.startswith("llama7b_2of4") and " 2:4 " in line for line in lines)
    assert any(line.startswith("tiny ") and "(trained here)" in line for line in lines)
    assert any(line.startswith("recommended_half") and "(set model=)" in line for line in lines)


def test_debug_is_an_option_of_every_command(asked):
    assert asked("keys", "export", "debug=true") == asked("keys", "export")
    with pytest.raises(
        UserError, match="is no finished run"
    ):  # the traceback that was asked for, of the first argument
        main(["compare", "nowhere", "debug=true"])
    with pytest.raises(UserError, match="2 paths are needed, 1 given"):
        main(["verify", "nowhere", "debug=true"])


@pytest.mark.parametrize("section", SECTIONS)
def test_keys_shows_default_range_and_meaning(asked, section):
    output = asked("keys", section)
    for f in dataclasses.fields(getattr(schema, section.capitalize())):
        (line,) = re.findall(rf"^{section}\.{f.name} .*$", output, flags=re.M)
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        assert f.metadata["help"] and f.metadata["help"] in line and keys.as_typed(default) in line
        assert all(choice in line for choice in f.metadata["choices"] or ())


def test_all_keys_are_listed(asked):
    listed = [line.split()[0] for line in asked("keys").splitlines()[1:]]
    plain = schema.plain(schema.Recipe())
    assert listed == [key for key in plain if key not in SECTIONS] + [
        f"{s}.{key}" for s in SECTIONS for key in plain[s]
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["recipies"], "did you mean 'recipes'?"),
        (["pln", "recipe=tiny"], "did you mean 'plan'?"),
        (["keys", "finetun"], "no section 'finetun': did you mean 'finetune'?"),
        (["keys", "prune", "finetune"], "keys takes one section"),
        (["recipes", "llama"], "recipes takes no argument"),
        (["--hlep"], "unknown option '--hlep'"),
        (["plan", "prune.sparcity=1"], "unknown key 'prune.sparcity': did you mean 'prune.sparsity'?"),
        (["plan", "stages=[prune]"], "no model: set model="),
        (["xyzzy"], "commands are plan, recipes,"),
    ],
)
def test_mistakes_are_one_line(asked, arguments, says):
    output = asked(*arguments, code=2)
    assert says in output and output.startswith("espalier: ") and len(output.splitlines()) == 1


@pytest.mark.slow
def test_a_thread_of_torch_does_not_abort_one_of_several_processes_that_is_done(tmp_path):
    """It did, rarely, when the interpreter was torn down under a thread that came back from torch."""
    (tmp_path / "busy.py").write_text(
        "import atexit, runpy, sys, threading, time, torch\n"
        "torch.set_num_threads(1)\n"
        "def work():\n"
        "    while True: torch.ones(200_000).add_(1)\n"
        "for _ in range(4): threading.Thread(target=work, daemon=True).start()\n"
        "atexit.register(lambda: print('atexit'))\n"
        "sys.argv = ['launch.py', sys.argv[1]]\n"
        "runpy.run_path('launch.py', run_name='__main__')"
    )
    for word, code in (("keys", 0), ("nothing", 2)):
        done = subprocess.run(
            [sys.executable, tmp_path / "busy.py", word],
            cwd=ROOT,
            env=os.environ | {"WORLD_SIZE": "2"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout[-7:]) == (code, "atexit\n"), done


@pytest.mark.slow
def test_lists_do_not_import_torch():
    code = (
        "import sys; from pipeline.commands.main import main\n"
        "for words in (['--help'], ['verify', '-h'], ['--version'], ['recipes'], ['keys'], ['recipies']): main(words)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_notebooks_backend_of_matplotlib_is_ignored():
    """Programs started from a notebook inherit it, but perhaps not its package."""
    code = "from pipeline.commands.main import main; main(['--help']); import matplotlib"
    environment = os.environ | {"MPLBACKEND": "module://package_of_a_notebook.backend_inline"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)


def test_the_reader_of_the_output_may_end_early():
    code = "from pipeline.commands.main import main; raise SystemExit(main(['keys']))"
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | head -1', shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.startswith("key ") and not done.stderr


@pytest.mark.slow
def test_plan_predicts_what_a_run_does_and_writes_nothing(asked, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one thread is faster on a busy machine
    chosen = [*QUICK, f"model={tiny_llama}", "run_dir=run", "stages=[prune,evaluate]", "evaluate.continuations=0"]
    output = asked("plan", *chosen)
    assert "  prune: runs\n  evaluate: runs\n" in output
    assert "prune: wanda, 2of4, 21 matrices" in output and "weights in the layers' matrices (100.0%)" in output
    assert "prune reads world@train: 8 windows of 32 tokens" in output
    assert re.search(r"^  memory: .* free$", output, flags=re.M) and re.search(
        r"^disk: about .* free$", output, flags=re.M
    )
    assert not list(tmp_path.iterdir())

    assert main(chosen) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    output = asked("plan", *chosen)
    assert re.search(r"prune: done before \(20.*s\)\n  evaluate: done before", output)
    output = asked("plan", *chosen, "prune.sparsity=0.5")
    assert "prune: runs again: prune.sparsity 2of4 -> 0.5" in output
    assert "evaluate: runs again, unless prune has the same outcome and no setting has changed" in output
    output = asked("plan", *chosen, "prune.refine=swaps", "prune.update=least_squares")
    assert "prune: wanda + swaps + least_squares, 2of4, 21 matrices" in output
    output = asked("plan", *chosen, "evaluate.windows=2")
    assert "prune: done before" in output and "evaluate: runs again: evaluate.windows None -> 2" in output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
def test_plan_makes_the_checks_of_a_run(asked, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = ["plan", *QUICK, f"model={tiny_llama}"]
    for wrong, says in {
        "calibration.seq_len=4096": "exceeds the model's 128 positions",
        "evaluate.tasks=[arc_eazy]": "did you mean arc_easy",
        "calibration.dataset=./nothing.jsonl": "nothing.jsonl",
        "prune.sparsity=3of7": "3of7 does not fit",
        "finetune.targets=[nothing]": "no pruned matrix is called 'nothing'",
    }.items():
        assert says in asked(*usual, wrong, code=2)
    assert not list(tmp_path.iterdir())


def test_plan_of_a_sweep_and_of_a_pretrain_recipe(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = asked("plan", "recipe=tiny", "prune.method=wanda,magnitude")
    assert "wanda:\n" in output and "magnitude:\n" in output and output.count("  pretrain: runs\n") == 2
    assert "model: a small Llama: " in output
    assert not list(tmp_path.iterdir())


def test_plan_says_how_much_each_stage_reads(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = asked("plan", "recipe=tiny", "finetune.validation=world@test", "finetune.validation_samples=9")
    assert "prune reads world@train: 64 windows of 128 tokens" in output
    assert "finetune reads world@train: 300 steps of 16 windows of 128 tokens" in output
    assert "finetune reads world@test: 9 windows of 128 tokens" in output
    assert "evaluate reads world@test: windows of 128 tokens" in output


def test_plan_does_not_download_a_model(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    output = asked("plan", "recipe=llama7b_2of4", "model=nobody/has-this")
    assert "nobody/has-this is not on this machine" in output and "  prune: runs\n" in output
    assert not list(tmp_path.iterdir())
