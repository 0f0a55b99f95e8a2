"""An edited score prunes again and an edited comment does not; `rerun=` runs any stage again."""

import shutil
from pathlib import Path

import pytest

from pipeline.runtime import checksums, code
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.settings.schema import STAGES, Recipe
from pipeline.stages import keys
from pipeline.stages.keys import stage_code
from tests.conftest import QUICK, ROOT, typing

ALL = (
    *QUICK,
    "stages=[prune,evaluate,report]",
    "evaluate.windows=2",
    "evaluate.continuations=0",
    "calibration.samples=2",
)
SCORES, CARD = "pipeline/pruning/scores.py", "pipeline/reporting/card.py"
TEMPLATE = "pipeline/reporting/page.html.jinja"
STATEMENT = "\nimport torch\n", "\nimport torch\n\nTHIS = 'is edited'\n"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A copy of the project's code for the fingerprints; the code that runs is the project's."""
    for name in code.PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "ROOT", tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def again(tiny_llama, tmp_path, monkeypatch, capsys):
    """Repeats the command of a finished run, and returns the message of each stage."""
    run = typing((*ALL, f"model={tiny_llama}", f"run_dir={tmp_path}/run"), monkeypatch, capsys)

    def type_again(*settings) -> dict[str, str]:
        code, output, errors = run(*settings)
        assert code == 0, errors
        messages = [line.partition(": ") for line in output.splitlines() if line.partition(":")[0] in STAGES]
        return {name: text for name, _, text in reversed(messages)}  # the first line of each

    type_again()
    return type_again


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def stage_fingerprints(recipe: Recipe = Recipe()) -> dict[str, dict[str, str]]:  # noqa: B008
    return {stage.name: stage_code(stage, recipe) for stage in STAGES.values()}


def changed(before: dict[str, dict[str, str]]) -> dict[str, set[str]]:
    """The packages by stage whose code has changed."""
    now = stage_fingerprints()
    packages_by_stage = {
        name: {package for package in now[name] if now[name][package] != before[name].get(package)} for name in now
    }
    return {name: packages for name, packages in packages_by_stage.items() if packages}


def test_comments_layout_and_unused_code_do_not_change_a_key(source):
    before = stage_fingerprints()
    edit(source / SCORES, '"""', '"""Another docstring. ')
    edit(source / SCORES, "import torch", "import torch  # of Meta\n\n\n")
    edit(source / "pipeline/runtime/processes.py", "import os", "import os, re")
    (source / "pipeline/pruning/another.py").write_text("THIS = 'is new'\n")
    assert changed(before) == {}


@pytest.mark.parametrize(
    ("path", "edits", "again", "done"),
    [
        (SCORES, STATEMENT, {"prune"}, {"pretrain", "evaluate", "report"}),
        ("pipeline/recovery/training.py", STATEMENT, {"pretrain", "finetune"}, {"prune", "evaluate", "report"}),
        ("pipeline/evaluation/perplexity.py", STATEMENT, {"evaluate"}, {"pretrain", "prune", "finetune"}),
        (CARD, ("import re\n", "import re, os\n"), set(), {"prune", "finetune", "evaluate"}),
        (TEMPLATE, ("<", "<!-- edited --><"), {"report"}, {"prune", "finetune", "evaluate"}),
    ],
)
def test_edited_code_changes_the_keys_of_stages_that_use_it(source, path, edits, again, done):
    before = stage_fingerprints()
    edit(source / path, *edits)
    packages_by_stage = changed(before)
    assert again <= packages_by_stage.keys() and not done & packages_by_stage.keys()
    assert all(packages == {str(Path(path).parent)} for packages in packages_by_stage.values())


def test_an_edited_method_changes_a_key_if_it_is_chosen(source, tmp_path):
    """Registries load by name, so no import shows the method's code; a user's class extends one of the project's."""
    own = tmp_path / "mine.py"
    own.write_text("from pipeline.pruning.obs_methods import SparseGpt\n\n\nclass Mine(SparseGpt):\n    pass\n")
    wanda, sparsegpt, mine = Recipe(), Recipe(), Recipe()
    sparsegpt.prune.method, mine.prune.method = "sparsegpt", str(own)
    before = [stage_fingerprints(recipe)["prune"] for recipe in (wanda, sparsegpt, mine)]
    edit(source / "pipeline/pruning/obs_methods.py", *STATEMENT)
    now = [stage_fingerprints(recipe)["prune"] for recipe in (wanda, sparsegpt, mine)]
    assert [old == new for old, new in zip(before, now)] == [True, False, False]


@pytest.mark.slow
def test_a_run_after_an_edit_runs_and_measures_again(source, again, tmp_path):
    edit(source / SCORES, *STATEMENT)
    messages = again()
    assert messages["prune"] == "the code of pipeline/pruning changed: running again"
    assert messages["evaluate"] == "the result of prune changed: running again"
    kept = set(tmp_path.glob(".measured/*.json"))
    edit(source / "pipeline/evaluation/perplexity.py", *STATEMENT)
    messages = again()
    assert (
        messages["prune"] == "done before"
        and messages["evaluate"] == "the code of pipeline/evaluation changed: running again"
    )
    assert len(set(tmp_path.glob(".measured/*.json")) - kept) == 2  # of the dense and the pruned model
    edit(source / TEMPLATE, "<", "<!-- edited --><")
    messages = again()
    assert messages.pop("report") == "the code of pipeline/reporting changed: running again"
    assert set(messages.values()) == {"done before"}


@pytest.mark.slow
def test_rerun_runs_only_the_named_stage_again(again, tmp_path):
    measured = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".measured/*.json")}
    for rerun, stages in (("prune", {"prune"}), ("[evaluate,report]", {"evaluate", "report"})):
        messages = again(f"rerun={rerun}")
        assert {name for name, text in messages.items() if text == f"rerun={name}: running again"} == stages
        assert {name for name, text in messages.items() if text == "done before"} == set(messages) - stages
        assert all((path.stat().st_mtime_ns != measured[path]) == ("evaluate" in stages) for path in measured)
    assert set(again().values()) == {"done before"}  # `rerun` is in no stage's key


@pytest.mark.slow
def test_convolutions_that_become_prunable_are_permuted_too(tiny_llama, tmp_path, typed):
    same = (f"model={tiny_llama}", f"run_dir={tmp_path}/run", "stages=[permute,prune]")
    assert typed(*same)[0] == 0
    assert "permute: prune.pointwise False -> True: running again" in typed(*same, "prune.pointwise=true")[1]


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        ({"finetune": {"lr": 1, "rank": 2}}, {"finetune": {"lr": 1, "rank": 4}}, "finetune.rank 2 -> 4"),
        (
            {"evaluate": {"limit": 1}, "data": {"c4": "a"}},
            {"evaluate": {"limit": 2}, "data": {}},
            "evaluate.limit 1 -> 2",
        ),
        ({"data": {"c4": "a"}}, {"data": {"c4": "b"}}, "c4 changed"),
        ({"data": {}}, {"data": {"world@test": "None"}}, "world@test is new"),
        ({"tasks": {"boolq": "a", "rte": "b"}}, {"tasks": {"boolq": "a"}}, "the task rte was left out"),
        ({"model": "a", "read": {"prune": "c"}}, {"model": "b", "read": {"prune": "d"}}, "the model folder changed"),
        ({"read": {"prune": "c"}}, {"read": {"prune": "d"}}, "the result of prune changed"),
        ({"code": {"data": "a", "engine": "b"}}, {"code": {"data": "a", "engine": "c"}}, "the code of engine changed"),
    ],
)
def test_the_reason_to_run_again_is_in_words(tmp_path, before, now, reason):
    checksums.write(tmp_path, {"key": "another", "made_from": before})
    assert keys.reason_to_run(tmp_path, now) == reason


def test_settings_that_differ_between_processes_are_named():
    assert keys.difference({"model": "a", "seed": 1}, {"model": "b", "seed": 2}) == "model a -> b"


@pytest.mark.parametrize(
    ("rerun", "says"), [("prun", "did you mean 'prune'?"), ("pretrain", r"rerun=pretrain: it is not in stages=\[prune")]
)
def test_rerun_of_an_unknown_stage_is_refused(rerun, says):
    with pytest.raises(UserError, match=says):
        reader.load(["model=m", "stages=[prune]", f"rerun={rerun}"])


def test_the_fingerprint_follows_every_import():
    """The fingerprint would miss modules whose names are computed at run time."""
    for name in STAGES:
        for path, text in code.used(f"pipeline.stages.{name}").items():
            assert "import_module" not in text and "__import__" not in text, path


def test_the_packages_that_each_stage_uses():
    used = {
        name: {package.removeprefix("pipeline/") for package in packages}
        for name, packages in stage_fingerprints().items()
    }
    assert {"pruning", "engine", "sparsity", "models", "data", "callbacks"} <= used["prune"]
    assert "recovery" in used["finetune"] and "evaluation" in used["evaluate"] and "reporting" in used["report"]
    assert not used["prune"] & {"recovery", "evaluation", "reporting", "runtime", "settings"}
    assert not used["evaluate"] & {"pruning", "recovery", "reporting", "callbacks"}
