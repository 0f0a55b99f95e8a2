"""Sweeps: every cell is an ordinary run, common stages run once, and a failing cell does not stop the others."""

import json
import sys
import time

import psutil
import pytest

import launch
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.stages import sweep
from tests import launches
from tests.conftest import QUICK
from tests.stages.test_run import weights


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("wanda", ["wanda"]),
        ("0.5,2of4", ["0.5", "2of4"]),
        ("[a,b]", ["[a,b]"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("{x: dense, y: [1,2]}", ["{x: dense, y: [1,2]}"]),
        ("", [""]),
    ],
)
def test_a_comma_separates_outside_of_brackets_and_quotes(text, parts):
    assert sweep.options(text) == parts


def test_cells_are_the_product_of_all_values():
    cells = sweep.cells(["prune.method=wanda,./my/own.py", "evaluate.tasks=[a,b]", "finetune.lr=1e-3,2e-3", "seed=7"])
    assert list(cells) == ["wanda_lr=1e-3", "wanda_lr=2e-3", "own_lr=1e-3", "own_lr=2e-3"]
    assert cells["own_lr=1e-3"] == [
        *("evaluate.tasks=[a,b]", "seed=7", "prune.method=./my/own.py", "finetune.lr=1e-3"),
        "run_dir=runs/tiny/own_lr=1e-3",
    ]
    assert sweep.cells(["recipe=tiny", "seed=7"]) == {"": ["recipe=tiny", "seed=7"]}
    assert list(sweep.cells(["model=m", "stages=[prune]", "prune.sparsity=0.5,2:4"])) == ["0.5", "2of4"]


def test_the_last_setting_of_a_key_counts():
    assert list(sweep.cells(["recipe=tiny", "seed=7", "seed=0,1"])) == ["seed=0", "seed=1"]
    assert list(sweep.cells(["recipe=tiny", "seed=0,1", "seed=7"])) == [""]
    assert reader.load(["recipe=tiny", "seed=0,1", "seed=7"]).seed == 7


def test_paths_with_the_same_last_part_keep_their_whole_path():
    assert list(sweep.cells(["model=./a/x,./b/x", "stages=[prune]", "run_dir=r"])) == [".-a-x", ".-b-x"]
    assert list(sweep.cells(["model=./a/x,./b/y", "stages=[prune]", "run_dir=r"])) == ["x", "y"]


def test_recipes_can_be_swept():
    cells = sweep.cells(["recipe=llama7b_2of4,llama13b_half", "finetune.lr=1e-3,2e-3"])
    assert len(cells) == 4
    assert cells["llama13b_half_lr=2e-3"][-1] == "run_dir=runs/llama7b_2of4-llama13b_half/llama13b_half_lr=2e-3"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("run_dir=a,b", "run_dir holds for the whole sweep"),
        ("prune.method=wanda,", "a value is missing"),
        ("seed=1,1", "is a value given twice?"),
        ("evaluate.tasks=boolq,rte", r"evaluate.tasks is a list: set 'evaluate.tasks=\[boolq,rte\]'"),
    ],
)
def test_bad_sweeps_are_refused(setting, says):
    with pytest.raises(UserError, match=says):
        sweep.cells([setting])


def test_a_mistake_in_any_cell_is_reported_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch.py", "prune.method=wanda,wnada", f"run_dir={tmp_path}/s"])
    assert launch.main() == 2
    assert "prune.method=wnada is neither known nor a .py file: did you mean" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_killed_sweep_resumes_and_runs_nothing_twice(tiny_llama, tmp_path, monkeypatch):
    folder = tmp_path / "sweep"
    own = [f"model={tiny_llama}", *QUICK]
    settings = [*own, f"run_dir={folder}", "prune.method=magnitude,wanda", "finetune.lr=1e-2,2e-2"]
    (running,) = launches.fork(tuple(settings), tmp_path / "killed")
    deadline = time.monotonic() + 300
    while not (folder / "magnitude_lr=2e-2/prune/stage.json").exists() and running.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cells = psutil.Process(running.pid).children()
    running.kill()
    running.join()
    psutil.wait_procs(cells, 20)  # they are killed with the sweep, but a moment later
    assert not (folder / "compare.html").exists()
    stages = {path: path.stat().st_mtime_ns for path in folder.glob("*/[!.]*/stage.json")}
    assert folder / "magnitude_lr=1e-2/report/stage.json" in stages

    output = launches.run(tuple(settings), tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in stages} == stages
    assert output.count("prune: reused from") == 1  # by wanda's second cell; magnitude's ran before the kill
    assert output.count("prune: done in") == 1
    # a text and the continuations of each model: dense, two pruned, four finetuned
    assert len(list(folder.glob(".measured/*.json"))) == 2 * (1 + 2 + 4)
    table = (folder / "compare.md").read_text()
    for label in ("dense", "magnitude", "Wanda", "Wanda + LoRA (finetune.lr=0.02)"):
        assert table.count(f"| {label} |") == 1
    assert (folder / "compare.svg").is_file()

    monkeypatch.setattr(sys, "argv", ["launch.py", *own, f"run_dir={folder}/alone", "finetune.lr=2e-2"])
    assert launch.main() == 0
    for stage in ("prune", "finetune"):
        cell, alone = folder / f"wanda_lr=2e-2/{stage}", folder / f"alone/{stage}"
        assert weights(cell / "model") == weights(alone / "model")
        assert not (cell / "stage.json").samefile(alone / "stage.json")  # an ordinary run reuses nothing


@pytest.mark.slow
def test_a_failed_cell_does_not_stop_the_others_also_with_two_processes(tiny_llama, tmp_path):
    settings = [f"model={tiny_llama}", *QUICK, "stages=[prune,evaluate,report]", f"run_dir={tmp_path}/sweep"]
    settings += [f"calibration.dataset=world,{tmp_path}/nowhere.txt", "seed=0,1"]
    output = launches.run(tuple(settings), tmp_path / "log", of=2, code=2)
    assert output.count("no dataset at") == 2
    assert "2 of 4 cells failed: dataset=nowhere.txt_seed=0, dataset=nowhere.txt_seed=1" in output
    for seed in (0, 1):
        results = json.loads((tmp_path / f"sweep/dataset=world_seed={seed}/evaluate/results.json").read_text())
        assert results["models"]["pruned"]["mask_violations"] == 0
    assert "Wanda (seed=1)" in (tmp_path / "sweep/compare.md").read_text()


@pytest.mark.slow
def test_a_sweep_without_common_measurements_is_done(tiny_llama, tmp_path):
    settings = [f"model={tiny_llama}", *QUICK, "stages=[evaluate]", f"run_dir={tmp_path}/sweep", "seed=0,1"]
    settings += ["evaluate.perplexity=[]", "evaluate.continuations=0"]
    assert "no comparison: nothing to compare: the runs have no perplexity" in launches.run(tuple(settings), tmp_path)
