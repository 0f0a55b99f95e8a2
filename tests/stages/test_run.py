"""Runs as a user starts them: finished stages are skipped, killed runs resume, mistakes give one-line messages."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pipeline.models import model_files
from pipeline.recovery import adapter_files, lora
from pipeline.runtime.versions import versions
from pipeline.sparsity.masks import Masks
from tests import launches
from tests.conftest import QUICK, ROOT, environment, espalier

pytestmark = pytest.mark.slow


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory) -> tuple[Path, list[str], str]:
    """An uninterrupted run: its folder, settings and output."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    settings = [f"model={tiny_llama}", *QUICK, "stages=[prune,finetune,export,evaluate,report]"]
    return run_dir, settings, espalier(*settings, f"run_dir={run_dir}")


def test_a_run_ends_with_an_exactly_sparse_model_and_the_table(finished):
    run_dir, _, seen = finished
    content = json.loads((run_dir / "evaluate/results.json").read_text())
    results = content["models"]
    assert list(results) == ["dense", "pruned", "finetuned"]
    for name in ("pruned", "finetuned"):
        assert results[name]["mask_violations"] == 0
        assert results[name]["sparsity"]["overall"] == pytest.approx(0.5, abs=1e-3)
        assert len(results[name]["sparsity"]["by_layer"]) == 3
    masks = Masks.load(run_dir / "prune/masks.safetensors")
    masks.check_patterns()
    model = AutoModelForCausalLM.from_pretrained(run_dir / "finetune/model")
    assert masks.violations(model.named_parameters()) == []
    assert "mask violations" in seen
    assert (run_dir / "report/report.html").stat().st_size > 5000
    about = json.loads((run_dir / "prune/stage.json").read_text())
    assert (
        about["cpu_seconds"] > 0
        and 0.1 < about["memory_gib"] < 8
        and "cores" in about["machine"]
        and about["recipe"]["run_dir"] == str(run_dir)
    )
    assert about["versions"] == content["versions"] == versions() and "not installed" not in versions().values()
    for stage in ("prune", "finetune", "export", "evaluate", "report"):
        assert not (run_dir / f".{stage}").exists()


def test_the_adapter_on_the_pruned_model_equals_the_merged_model(finished):
    run_dir, _, _ = finished
    pruned = AutoModelForCausalLM.from_pretrained(run_dir / "prune/model")
    adapted = adapter_files.load_adapter(pruned, run_dir / "finetune/adapter")
    merged = dict(model_files.tensors(run_dir / "finetune/model"))
    for name, layer in lora.masked_layers(adapted).items():
        assert layer.merged_weight().equal(merged[name])


def test_the_same_command_again_only_shows_the_report(finished, tmp_path):
    run_dir, settings, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    seen = launches.run((*settings, f"run_dir={run_dir}"), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    assert seen.count("done before") == 5
    assert "mask violations" in seen


def test_a_changed_limit_runs_evaluate_and_report_only(finished, typed, tmp_path):
    run_dir, settings = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    before = weights(run_dir / "finetune/model")
    stamps = {name: (run_dir / name / "stage.json").stat().st_mtime_ns for name in ("prune", "finetune")}
    code, seen, _ = typed(*settings, f"run_dir={run_dir}", "evaluate.limit=10")
    assert code == 0 and "evaluate: evaluate.limit 20 -> 10: running again" in seen
    assert seen.count("done before") == 3
    assert {name: (run_dir / name / "stage.json").stat().st_mtime_ns for name in stamps} == stamps
    assert weights(run_dir / "finetune/model") == before


@pytest.mark.parametrize("moment", ["prune/model/model-00001", "finetune/checkpoints/step=4"])
def test_a_killed_and_repeated_run_has_the_same_weights(finished, tmp_path, moment):
    whole, settings, _ = finished
    run_dir = tmp_path / "killed"
    (running,) = launches.fork((*settings, f"run_dir={run_dir}"), tmp_path / "log")
    stage, _, rest = moment.partition("/")
    deadline = time.monotonic() + 120
    while not list((run_dir / f".{stage}" / rest).parent.glob(Path(rest).name + "*")) and running.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.kill()
    running.join()
    assert not (run_dir / "finetune").exists()
    launches.run((*settings, f"run_dir={run_dir}"), tmp_path / "log")
    assert weights(run_dir / "prune/model") == weights(whole / "prune/model")
    for name in ("masks.safetensors", "matrices.csv"):
        assert (run_dir / "prune" / name).read_bytes() == (whole / "prune" / name).read_bytes()
    assert weights(run_dir / "finetune/model") == weights(whole / "finetune/model")
    assert weights(run_dir / "export/compact") == weights(whole / "export/compact")


def test_two_processes_give_the_same_masks_and_numbers(finished, tmp_path):
    whole, settings, _ = finished
    launches.run((*settings, f"run_dir={tmp_path}/two"), tmp_path / "log", of=2)
    two = tmp_path / "two"
    assert (two / "prune/masks.safetensors").read_bytes() == (whole / "prune/masks.safetensors").read_bytes()
    assert weights(two / "prune/model") == weights(whole / "prune/model")
    one_rows, two_rows = ((run / "finetune/metrics.csv").read_text().splitlines()[1:] for run in (whole, two))
    for mine, theirs in zip(two_rows, one_rows, strict=True):
        assert float(mine.split(",")[1]) == pytest.approx(float(theirs.split(",")[1]), abs=1e-4)
    values = [json.loads((run / "evaluate/results.json").read_text())["models"] for run in (whole, two)]
    for name in ("dense", "pruned"):
        assert values[1][name]["perplexity"]["world"] == pytest.approx(values[0][name]["perplexity"]["world"], rel=1e-9)


def test_export_on_two_processes_gives_the_same_bytes(finished, tmp_path):
    folder, settings = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    seen = espalier(*settings, f"run_dir={folder}", "rerun=export", processes=2)
    assert "export: rerun=export: running again" in seen and seen.count("done before") == 4
    for path in (finished[0] / "export").rglob("*"):
        if path.is_file() and path.name != "stage.json":
            assert (folder / path.relative_to(finished[0])).read_bytes() == path.read_bytes(), path.name


def test_a_single_process_launched_for_two_is_refused(tiny_llama):
    line = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "launch.py",
        f"model={tiny_llama}",
    ]
    done = subprocess.run([*line, *QUICK], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "espalier: several processes were requested" in done.stderr
    assert "--multi_gpu --num_processes N" in done.stderr


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["prune.sparcity=0.5"], "did you mean 'prune.sparsity'?"),
        (["model=./nowhere"], "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_a_failing_exit_code(tiny_llama, tmp_path, settings, says):
    line = [sys.executable, "launch.py", f"model={tiny_llama}", *QUICK, f"run_dir={tmp_path}/bad", *settings]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    mine = [text for text in done.stderr.splitlines() if text.startswith("espalier:")]
    assert len(mine) == 1 and says in mine[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bad").exists()
