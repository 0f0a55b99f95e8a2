"""Recipes and settings are read, and mistakes in them give one-line messages before anything is loaded."""

import re
import subprocess
import sys

import pytest

from pipeline.runtime.errors import UserError
from pipeline.settings import reader, recipe_files
from pipeline.stages import sweep
from tests.conftest import ROOT

FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
WITHOUT_MODEL = ("paper", "images", "recommended")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_is_short(path):
    extra = ["model=somewhere"] if path.stem in WITHOUT_MODEL else []
    loaded = reader.load([f"recipe={path}", *extra])
    assert loaded.run_dir == f"runs/{path.stem}"
    assert len(path.read_text().splitlines()) <= 20


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("prune.sparcity=0.5", "unknown key 'prune.sparcity': did you mean 'prune.sparsity'?"),
        ("modle=x", "did you mean 'model'?"),
        ("prune.sparsity=124", "=2of4"),
        ("prune.sparsity=4:2", "0 < N < M"),
        ("prune.overrides={'*.0.*': 124}", "=2of4"),
        ("prune.sparsity=1.5", "between 0 and 1"),
        ("prune.sparsity=0", "between 0 and 1"),
        ("prune.sparsity=4of2", "0 < N < M"),
        ("prune.sparsity=half", "is not a sparsity"),
        ("prune.sparsity=nan", "between 0 and 1"),
        ("prune.sparsity=inf", "between 0 and 1"),
        ("prune.method=wandda", "did you mean 'wanda'?"),
        ("prune=wanda", "this is a section"),
        ("stages={}", "stages is a list: set 'stages=["),
        ("evaluate.tasks={a: 1}", "evaluate.tasks is a list: set"),
        ("prune.overrides=0", "prune.overrides=0: {name: value, ...} is needed"),
        ("prune.overrides=null", "prune.overrides=None: {name: value, ...} is needed"),
        ("finetune.rank=0", "finetune.rank=0 is out of range"),
        ("finetune.rank=-3", "finetune.rank=-3 is out of range"),
        ("finetune.rank=many", "finetune.rank"),
        ("finetune.lr=nan", "not a finite number"),
        ("seed=99999999999999", "set a value from 0 to 4294967295"),
        ("timeout_minutes=1e300", "is out of range"),
        ("evaluate.limit=1" + 30 * "0", "is out of range: set a value from 1 to 2147483647"),
        ("threads=100000", "threads=100000 is out of range: set a value from 1 to 1024"),
        ("calibration.samples=1.5", "calibration.samples"),
        ("stages=[prun]", "did you mean 'prune'?"),
        ("stages=[finetune]", "finetune needs prune"),
        ("stages=[prune,report]", "report needs evaluate"),
        ("recipe=lama7b_2of4", "did you mean 'llama7b_2of4'?"),
        ("recipe=llama7b_2of3", "recipe 'llama7b' has no variant '2of3': did you mean '2of4'?"),
        ("recipe=./none.yaml", "recipe=./none.yaml: no such file"),
        ("recipe=recipes/tiny", "recipe=recipes/tiny: no such file (the path of a recipe ends with .yaml)"),
        ("recipe=zzz", "no recipe 'zzz': `espalier recipes` lists all"),
        ("evaluate.tasks=arc_easy", "evaluate.tasks"),
        ("justaword", "key=value"),
    ],
)
def test_bad_input_is_one_line(argument, says):
    arguments = [argument] if argument.startswith("recipe=") else ["recipe=llama7b_2of4", argument]
    with pytest.raises(UserError) as raised:
        reader.load(arguments)
    message = str(raised.value)
    assert says in message
    assert "\n" not in message
    assert len(message) < 250


def test_no_model_says_what_to_set():
    with pytest.raises(UserError, match="model=<hub id or folder>"):
        reader.load(["stages=[prune]"])


def test_2_4_with_a_colon_is_read_on_the_command_line(tmp_path):
    """In a file, YAML reads 2:4 without quotes as 124."""
    path = tmp_path / "mine.yaml"
    path.write_text('model: m\nprune: {sparsity: "2:4"}\n')
    assert reader.load([f"recipe={path}"]).prune.sparsity == "2:4"
    for typed in ("2:4", '"2:4"', "2of4"):
        assert reader.load([f"recipe={path}", f"prune.sparsity={typed}"]).prune.sparsity == "2of4"
    typed = """prune.overrides={'*.0.*': 2:4, "*.1.*":"4:8", '*.2.*': 0.5, '*.1:2.*': dense}"""
    expected = {"*.0.*": "2of4", "*.1.*": "4of8", "*.2.*": 0.5, "*.1:2.*": "dense"}
    assert reader.load([f"recipe={path}", typed]).prune.overrides == expected
    for key in ("sparsity: 2:4", "overrides: {'*.0.*': 2:4}"):
        path.write_text(f"model: m\nprune: {{{key}}}\n")
        with pytest.raises(UserError, match="YAML reads 2:4 as 124: set prune.*=2of4"):
            reader.load([f"recipe={path}"])


def test_extends_then_file_then_command_line(tmp_path):
    (tmp_path / "base.yaml").write_text("model: m\nseed: 1\nfinetune: {rank: 4, alpha: 4}\n")
    (tmp_path / "mine.yaml").write_text("extends: base\nfinetune: {rank: 5}\n")
    loaded = reader.load([f"recipe={tmp_path / 'mine.yaml'}", "finetune.alpha=6"])
    assert (loaded.seed, loaded.finetune.rank, loaded.finetune.alpha) == (1, 5, 6)


@pytest.mark.slow
def test_every_available_recipe_loads():
    names = recipe_files.available()
    for model in ("llama7b", "llama2_70b", "llama3_2_1b", "opt_1_3b"):
        assert {model, f"{model}_2of4", f"{model}_4of8", f"{model}_half"} <= set(names)
    for name in names:
        loaded = reader.load([f"recipe={name}", *(["model=m"] if name.startswith(WITHOUT_MODEL) else [])])
        assert loaded.run_dir == f"runs/{name}"
    assert str(reader.load(["recipe=opt_6_7b_half"]).prune.sparsity) == "0.5"


def test_variants_override_their_recipe_and_are_inherited(tmp_path):
    (tmp_path / "base.yaml").write_text("model: m\nvariants: {a: {seed: 1}, b_c: {seed: 2, dtype: float32}}\n")
    (tmp_path / "mine.yaml").write_text("extends: base\nseed: 3\nvariants: {a: {seed: 4}}\n")
    (tmp_path / "chosen.yaml").write_text("extends: base_b_c\nseed: 5\n")
    seeds = {"base_a": 1, "base_b_c": 2, "mine": 3, "mine_a": 4, "mine_b_c": 2, "chosen": 5, "chosen_a": 1}
    for name, seed in seeds.items():
        loaded = reader.load([f"recipe={tmp_path}/{name}.yaml"])
        assert (loaded.seed, loaded.run_dir) == (seed, f"runs/{name}")
    assert reader.load([f"recipe={tmp_path}/chosen.yaml"]).dtype == "float32"
    assert reader.load([f"recipe={tmp_path}/mine_a.yaml", "seed=6"]).seed == 6


@pytest.mark.parametrize(
    ("variants", "says"),
    [("[a]", "variants of "), ("{a: 1}", "variants of "), ("{a: {sed: 1}}", "did you mean 'seed'?")],
)
def test_a_mistake_in_a_variant_is_one_line(tmp_path, variants, says):
    (tmp_path / "mine.yaml").write_text(f"model: m\nvariants: {variants}\n")
    with pytest.raises(UserError, match=re.escape(says)):
        reader.load([f"recipe={tmp_path}/mine_a.yaml"])


def test_a_recipe_that_extends_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b\n")
    (tmp_path / "b.yaml").write_text("extends: a\n")
    with pytest.raises(UserError, match="extends itself"):
        reader.load([f"recipe={tmp_path / 'a.yaml'}"])


def test_recipes_have_the_papers_settings():
    loaded = reader.load(["recipe=llama2_7b_4of8"])
    assert loaded.calibration.samples == 128
    assert loaded.calibration.seq_len == loaded.evaluate.seq_len == 4096
    assert reader.load(["recipe=llama7b_half"]).calibration.seq_len == 2048


def test_a_bad_key_is_reported_without_importing_torch():
    code = (
        "import sys; sys.argv = ['launch.py', 'finetune.rnak=1']\n"
        "import launch; code = launch.main(); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert done.stderr.strip() == "espalier: unknown key 'finetune.rnak': did you mean 'finetune.rank'?"


@pytest.mark.parametrize(
    "path",
    [
        "./a b",
        "./größe/日本",
        "./a,b",
        "./a[0-9]*/{b}",
        "./v@2/x:y",
        "./a #1",
        "./a: b",
        "./it's",
        "12e4567",
        "0123",
        "on",
        "a=b",
    ],
)
def test_paths_are_taken_verbatim(path):
    """YAML would read some of these as a comment, a number, a list or a mapping."""
    quoted = f'"{path}"'
    for typed in (quoted, *([path] if "," not in path else [])):  # a comma without quotes makes a sweep
        arguments = sweep.cells([f"model={typed}", f"calibration.dataset={typed}", "stages=[prune]"])
        assert list(arguments) == [""]
        loaded = reader.load([*arguments[""], f"run_dir={typed}", f"mirror={typed}"])
        assert [loaded.model, loaded.calibration.dataset, loaded.run_dir, loaded.mirror] == [path] * 4


def test_a_sweep_in_a_folder_with_a_comma():
    for folder in ("./a,b", "./it's,b"):
        cells = sweep.cells(["seed=1,2", f'run_dir="{folder}"', "model=m", "stages=[prune]"])
        for name, arguments in cells.items():
            (again,) = sweep.cells(arguments).values()
            assert reader.load(again).run_dir == f"{folder.removeprefix('./')}/{name}"


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    method = "from pipeline.pruning.method import PruneMethod\nclass Own(PruneMethod): ...\n"
    (tmp_path / "own.py").write_text(method)
    (tmp_path / "r.yaml").write_text("model: ~/model\nstages: [prune]\nevaluate: {tasks: [~/t.yaml, boolq]}\n")
    more = ["run_dir=~/runs/x", "mirror=~/hub", "prune.method=~/own.py"]
    loaded = reader.load(["recipe=~/r.yaml", *more])
    assert [loaded.model, loaded.run_dir, loaded.mirror] == [
        f"{tmp_path}/{name}" for name in ("model", "runs/x", "hub")
    ]
    assert loaded.prune.method == f"{tmp_path}/own.py"
    assert loaded.evaluate.tasks == [f"{tmp_path}/t.yaml", "boolq"]
    with pytest.raises(UserError, match="run_dir=~nobody-here/x: there is no such home folder"):
        reader.load(["recipe=~/r.yaml", "run_dir=~nobody-here/x"])


def test_null_is_none():
    assert reader.load(["model=m", "stages=[prune]", "revision=null"]).revision is None
