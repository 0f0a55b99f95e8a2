"""A compact model with rounded values is evaluated like any other model."""

import json

import pytest
import torch

from pipeline.compact.compact_model import load_compact, make_dense
from pipeline.settings import reader
from pipeline.stages import runner
from tests.conftest import QUICK

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "run"
    stages = "stages=[prune,export,evaluate,report]"
    more = (stages, "export.values=int8", "prune.sparsity=0.5", f"model={tiny_llama}", f"run_dir={folder}")
    runner.run(reader.load([*QUICK, *more]))
    return folder


def test_rounding_is_a_row_of_the_results_and_of_the_report(run):
    models = json.loads((run / "evaluate/results.json").read_text())["models"]
    assert list(models) == ["dense", "pruned", "compact"]
    pruned, compact = (next(iter(models[name]["perplexity"].values())) for name in ("pruned", "compact"))
    assert compact != pruned and compact == pytest.approx(pruned, rel=0.02)
    assert set(models["compact"]["differences"]) == {"dense", "pruned"}
    text = (run / "report/report.md").read_text()
    assert "after rounding to int8" in text
    sizes = json.loads((run / "export/sizes.json").read_text())["matrix_bytes"]
    assert sizes["compact"] < 0.25 * sizes["ordinary"]  # float32: 9 of 32 bits at 50%, and scales


def test_an_exact_folder_is_not_evaluated_again(run, tiny_llama):
    folder = run.parent / "exact"
    stages = "stages=[prune,export,evaluate,report]"
    runner.run(reader.load([*QUICK, stages, "prune.sparsity=0.5", f"model={tiny_llama}", f"run_dir={folder}"]))
    assert list(json.loads((folder / "evaluate/results.json").read_text())["models"]) == ["dense", "pruned"]


@pytest.mark.parametrize("placement", ["stream", "device_map"])
def test_placement_does_not_change_results(run, tiny_llama, placement):
    folder = run.parent / placement / "run"  # measurements are cached next to a run
    stages = "stages=[prune,export,evaluate]"
    more = (stages, "export.values=int8", "prune.sparsity=0.5", f"model={tiny_llama}", f"run_dir={folder}")
    runner.run(reader.load([*QUICK, *more, f"evaluate.placement={placement}"]))
    here, there = (json.loads((of / "evaluate/results.json").read_text())["models"]["compact"] for of in (run, folder))
    assert there["perplexity"] == pytest.approx(here["perplexity"], rel=1e-5)
    assert there["continuations"] == here["continuations"]


@torch.no_grad()
def test_made_dense_it_computes_the_same(run):
    ids = torch.arange(24)[None]
    compact, dense = (load_compact(run / "export/compact") for _ in range(2))
    make_dense(dense)
    assert all("_compact" not in module.__dict__ for module in dense.modules())
    assert {name for name, _ in dense.named_parameters()} > {name for name, _ in compact.named_parameters()}
    torch.testing.assert_close(compact(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
