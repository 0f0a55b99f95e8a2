"""The examples of CONTRIBUTING.md work: an algorithm is one user file, a stage is two files."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import registry
from pipeline.commands import compare
from pipeline.registry import FINETUNE_METHODS, PATTERNS, REGISTRIES
from pipeline.runtime.errors import UserError
from pipeline.settings import reader, schema
from pipeline.sparsity.masks import Masks
from pipeline.stages import keys, runner
from tests.conftest import QUICK, ROOT, environment
from tests.pruning.test_prune import sparsity_by_layer
from tests.reporting.report_files import Page

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
(LINE,) = re.findall(r'^    Stage\("histogram".*\n', (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)
BASES = {"prune.method": "PruneMethod", "prune.sparsity": "Pattern", "prune.allocation": "Allocation"}
BASES |= {"finetune.method": "SparseFull", "prune.refine": "Refinement", "prune.update": "WeightUpdate"}


def snippet(says: str) -> str:
    (code,) = (text for text in SNIPPETS if says in text)
    return code


def own_files(folder: Path, *keys: str) -> list[str]:
    """Writes a user file for each key to `folder`; returns the settings."""
    for key in keys:
        (folder / f"my_{key}.py").write_text(snippet(f"({BASES[key]})"))
    return [f"{key}={folder}/my_{key}.py" for key in keys]


@pytest.fixture(scope="module")
def runs(tiny_llama, tmp_path_factory) -> Path:
    """Two finished runs with user files that have been removed, and their comparison."""
    folder = tmp_path_factory.mktemp("own")
    usual = (*QUICK, f"model={tiny_llama}", "evaluate.continuations=0")
    a = own_files(folder, "prune.method", "prune.sparsity", "finetune.method")
    b = [*own_files(folder, "prune.method", "prune.allocation", "prune.refine", "prune.update"), "prune.sparsity=0.5"]
    b.append("stages=[prune,evaluate,report]")
    with pytest.MonkeyPatch.context() as patch:
        for name, settings in (("a", a), ("b", b)):
            patch.setattr(sys, "argv", ["launch.py", *usual, *settings, f"run_dir={folder}/runs/{name}"])
            assert runner.run(reader.load(sys.argv[1:])) is None
    for path in folder.glob("*.py"):
        path.unlink()
    compare.main([str(folder / "runs"), f"out={folder}"])
    return folder


@pytest.mark.slow
def test_user_method_pattern_and_finetuning_appear_in_all_reports(runs):
    markdown = (runs / "runs/a/report/report.md").read_text()
    for text in (markdown, Page((runs / "runs/a/report/report.html").read_text()).text):
        assert "pruned with square root to half the columns" in text
        assert "norm tuning for 6 steps" in text
        assert "Between magnitude and Wanda" in text and 'Doe 2026, "Roots"' in text
    pruned, finetuned = ((runs / f"runs/a/{stage}/model/README.md").read_text() for stage in ("prune", "finetune"))
    for card in (pruned, finetuned):
        assert "pruned with square root to half the columns" in card
    assert "fine-tuned within its masks: norm tuning (" in finetuned
    for text in ((runs / "compare.md").read_text(), Page((runs / "compare.html").read_text()).text):
        assert "square root (prune.allocation=uniform) + norm tuning" in text and "half the columns" in text
    results = json.loads((runs / "runs/a/evaluate/results.json").read_text())["models"]
    assert results["finetuned"]["mask_violations"] == 0
    assert results["finetuned"]["perplexity"] != results["pruned"]["perplexity"]


@pytest.mark.slow
def test_a_user_allocation_appears_in_all_reports(runs):
    masks = Masks.load(runs / "runs/b/prune/masks.safetensors")
    by_layer = sparsity_by_layer(masks)
    assert by_layer == pytest.approx([0.4, 0.5, 0.6], abs=0.03)
    markdown = (runs / "runs/b/report/report.md").read_text()
    for text in (markdown, Page((runs / "runs/b/report/report.html").read_text()).text):
        assert "by depth: Later layers are pruned more" in text
        assert "pruned with square root + one for one + keep the norm to 0.5" in text
    assert "to 0.5 shared out by by depth" in (runs / "runs/b/prune/model/README.md").read_text()
    assert "square root + one for one + keep the norm (prune.allocation=by depth)" in (runs / "compare.md").read_text()


@pytest.mark.parametrize("key", REGISTRIES)
def test_an_edited_user_file_runs_its_stage_again(tiny_llama, tmp_path, key):
    more = ["prune.sparsity=0.5"] if key == "prune.allocation" else []
    recipe = reader.load([f"model={tiny_llama}", *QUICK, *more, *own_files(tmp_path, key)])
    before = keys.external_inputs(recipe)
    path, stage = tmp_path / f"my_{key}.py", key.partition(".")[0]
    path.write_text(path.read_text() + "\nSOMETHING = 1\n")
    now = keys.external_inputs(recipe)
    assert {name for name in now if now[name] != before[name]} == {stage}
    assert list(schema.STAGES[stage].settings).count(stage) == 1


@pytest.mark.parametrize("key", REGISTRIES)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such file"),
        ("def", "does not load: SyntaxError"),
        ("import nothing_of_that_name", "does not load: ModuleNotFoundError"),
        ("x = 1", "defines 0 subclasses of"),
    ],
)
def test_a_bad_file_is_one_line_before_any_work(tmp_path, key, text, says):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says) as raised:
        reader.load(
            [
                "model=m",
                "stages=[prune,finetune]",
                f"{key}={path}",
                *(["prune.sparsity=0.5"] if key == "prune.allocation" else []),
            ]
        )
    assert "\n" not in str(raised.value) and str(raised.value).startswith(f"{key}={path}")


def test_a_file_may_define_a_dataclass_and_give_it_a_second_name(tmp_path):
    """With annotations that are not evaluated, dataclasses look for the file's module."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from pipeline.sparsity.patterns import Pattern\n\n"
        "@dataclass(frozen=True)\nclass Mine(Pattern):\n    ratio: float = 0.5\n\nSame = Mine\n"
    )
    assert PATTERNS.entry(path).load()().ratio == 0.5


def test_a_subclass_inherits_its_base_classs_entry(tmp_path):
    (setting,) = own_files(tmp_path, "finetune.method")
    path = setting.partition("=")[2]
    entry, base = FINETUNE_METHODS.entry(path), FINETUNE_METHODS.entry("full")
    assert (entry.label, entry.trains_weights, entry.leaves_model) == ("norm tuning", True, True)
    assert entry.trained_parameters(schema.Finetune(), 99, 9) == base.trained_parameters(schema.Finetune(), 99, 9) == 99
    with pytest.raises(UserError, match="finetune.quantize freezes the weights, .*: set finetune.method=lora"):
        reader.load(["model=m", "stages=[prune,finetune]", setting, "finetune.quantize=nf4"])
    Path(path).write_text(Path(path).read_text().replace('label = "norm tuning"', "trains_weights = False"))
    entry = FINETUNE_METHODS.entry(path)
    assert (entry.label, entry.trains_weights, entry.citation) == ("my_finetune.method", False, None)


def test_an_allocation_needs_a_ratio_and_must_return_numbers(tmp_path, tiny_llama, refused):
    (setting,) = own_files(tmp_path, "prune.allocation")
    with pytest.raises(UserError, match="set prune.sparsity=0.5"):
        reader.load(["model=m", "stages=[prune,finetune]", setting])
    path = Path(setting.partition("=")[2])
    path.write_text(path.read_text().replace("len(measured))]", "1)]"))
    output = refused(tmp_path / "run", f"model={tiny_llama}", setting, "prune.sparsity=0.5")
    assert "ByDepth.ratios returned [0.4]: return 3 numbers" in output


FAULTS = ("1 / 0", "weight_OI @ weight_OI.new_zeros(0)", "F.dropout(weight_OI, 3.0)", 'json.loads("{")', "apply_(0, 0)")


@pytest.mark.parametrize("code", FAULTS)
def test_an_exception_in_a_users_file_names_its_line(tmp_path, tiny_llama, refused, code):
    """Also one that is raised in what it calls: torch's C++ and Python, the standard library, this package."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import json\nimport torch.nn.functional as F\nfrom pipeline.sparsity.masks import apply_\n"
        "from pipeline.pruning.score_methods import Wanda\n\n\nclass Mine(Wanda):\n"
        f"    def score(self, weight_OI, *statistics):\n        return {code}\n"
    )
    message = refused(tmp_path / "run", f"model={tiny_llama}", f"prune.method={path}")
    assert f"({path}, line 9: debug=true shows the traceback)" in message and "a bug" not in message


def test_an_exception_elsewhere_is_a_bug(tmp_path, tiny_llama, refused, monkeypatch):
    """In this package, or in Python code that it calls."""
    with monkeypatch.context() as patch:
        patch.setattr(registry.PRUNE_METHODS, "entries", None)
        assert "(a bug in Espalier: " in refused(tmp_path / "run", f"model={tiny_llama}")
    monkeypatch.setattr(runner, "run", json.loads)
    message = refused(tmp_path / "run", f"model={tiny_llama}")
    assert "TypeError: the JSON object must be" in message and "(a bug in Espalier: " in message


def test_an_unused_setting_is_reported():
    chosen = reader.load(
        ["model=m", "stages=[prune,finetune]", "prune.damp=0.1", "finetune.method=full", "finetune.rank=3"]
    )
    output = registry.ignored(chosen)
    assert output[0] == "prune.damp is set, but method=wanda does not read it"
    assert "finetune.rank is set, but method=full does not read it" in output
    assert not registry.ignored(
        reader.load(["model=m", "stages=[prune,finetune]", "prune.damp=0.1", "prune.method=sparsegpt"])
    )


@pytest.mark.parametrize("key", REGISTRIES)
def test_every_entry_is_complete(key):
    entries, section = REGISTRIES[key], key.partition(".")[0]
    settings = getattr(schema.Recipe(), section)
    for name, entry in entries.entries.items():
        assert (entry.name, entry.label.strip(), bool(entry.description)) == (name, entry.label, True)
        assert not entry.description.endswith(".")
        assert all(hasattr(settings, setting) for setting in entry.reads)
        base = registry.entry._resolve(entries.base)
        assert issubclass(entry.load(), base)
    assert len({entry.label for entry in entries.entries.values()}) == len(entries.entries)


def test_no_entry_is_named_outside_the_registries():
    """Except for the defaults in the schema and in the API."""
    names = {name for registered in REGISTRIES.values() for name in registered.entries} - {registry.NONE}
    paths = [ROOT / "launch.py", *ROOT.glob("callbacks/*.py"), *ROOT.glob("pipeline/**/*.py")]
    for path in (path for path in paths if path.parent.name != "registry"):
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        defaults = {id(c.args[0]) for c in calls if any(keyword.arg == "registry" for keyword in c.keywords)}
        if path.parent.name == "api":
            arguments = [node for node in ast.walk(tree) if isinstance(node, ast.arguments)]
            defaults |= {id(default) for node in arguments for default in (*node.defaults, *node.kw_defaults)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in defaults:
                assert node.value not in names, f"{path}:{node.lineno}: {node.value}"


@pytest.mark.slow
def test_a_new_stage_is_two_files(tiny_llama, tmp_path):
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "pipeline", copy / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("callbacks", "recipes"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "launch.py", copy)
    (copy / "pipeline/stages/histogram.py").write_text(snippet("def run(recipe"))
    path = copy / "pipeline/settings/schema.py"
    text = path.read_text()
    for before, new in (
        ("@dataclass\nclass Recipe", snippet("class Histogram") + "\n\n"),
        ('    Stage("evaluate"', LINE),
        ("    evaluate: Evaluate =", "    histogram: Histogram = field(default_factory=Histogram)\n"),
    ):
        assert text.count(before) == 1
        text = text.replace(before, new + before)
    path.write_text(text)

    def run(*settings: str) -> subprocess.CompletedProcess:
        chosen = [*QUICK, "stages=[prune,histogram,evaluate,report]", f"model={tiny_llama}", f"run_dir={tmp_path}/run"]
        line = [sys.executable, "launch.py", *chosen, "evaluate.continuations=0", *settings]
        return subprocess.run(line, cwd=copy, env=environment(), capture_output=True, text=True, timeout=300)

    assert "histogram.bins=0 is out of range" in run("histogram.bins=0").stderr
    done = run("histogram.bins=7")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads((tmp_path / "run/histogram/histogram.json").read_text())["counts"]) == 7
    assert "| histogram |" in (tmp_path / "run/report/report.md").read_text()
