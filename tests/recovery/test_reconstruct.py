"""A reconstructed layer keeps its mask and is never worse than the pruned one; a resume and any number of processes give
the same result."""

import csv
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.data import sources, token_windows
from pipeline.engine.blocks import find_blocks
from pipeline.evaluation.perplexity import full_logits, window_losses, windows
from pipeline.models import loading, model_files, processors
from pipeline.models.rewrite import parameters
from pipeline.recovery import layer_fit
from pipeline.runtime.errors import UserError
from pipeline.settings import reader, schema
from pipeline.sparsity.masks import by_matrix
from pipeline.stages import reconstruct, runner
from tests import launches
from tests.conftest import QUICK
from tests.engine.test_decoder import FAMILIES
from tests.pruning.test_prune import Killed, families, pruned  # noqa: F401  (a fixture)

STEPS = ("reconstruct.samples=32", "reconstruct.batch_size=2", "reconstruct.accumulate=2", "reconstruct.epochs=3")
SETTINGS = [*(s for s in QUICK if not s.startswith("stages")), *STEPS, "reconstruct.lr=0.03"]
ALIKE = ("mistral", "qwen2", "qwen3", "gemma3_text")  # train as llama and gemma2 do


def settings(model, *more):
    return reader.load([f"model={model}", "stages=[prune,reconstruct]", *SETTINGS, *more])


def reconstructed(model, where, *more):
    """Runs the stage after a prune stage in `where`; returns the weights by name and the rows of the table."""
    folder = where / "reconstruct"
    folder.mkdir(exist_ok=True)
    reconstruct.run(settings(model, *more), folder, {"prune": where / "prune"})
    with open(folder / "layers.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return dict(model_files.tensors(folder / "model")), rows


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ALIKE])
@pytest.mark.slow
def test_every_family_improves_and_keeps_its_masks(families, tmp_path, family):  # noqa: F811
    origin = families(family)
    masks, before = pruned(origin, tmp_path / "prune", "prune.sparsity=2of4")
    weights, rows = reconstructed(origin, tmp_path)
    assert set(weights) == set(before)
    before, weights = (
        dict(parameters(tmp_path / stage / "model", schema.Recipe())) for stage in ("prune", "reconstruct")
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "reconstruct/model")
    assert masks.violations(loaded.named_parameters()) == []
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert all(row["error_after"] < row["error_before"] for row in rows)
    inside = tuple(f"{block.name}." for block in find_blocks(loaded))
    before, weights = dict(by_matrix(before.items())), dict(by_matrix(weights.items()))
    changed = {name for name in weights if not weights[name].equal(before[name])}
    assert set(masks) <= changed
    assert all(name.startswith(inside) for name in changed)
    for name, mask in masks.items():
        assert not weights[name][~mask].any() and not torch.signbit(weights[name][~mask]).any()


@torch.no_grad()
def test_the_errors_in_the_table_equal_those_of_the_whole_model(tiny_llama, tmp_path):
    pruned(tiny_llama, tmp_path / "prune")
    _, rows = reconstructed(tiny_llama, tmp_path)
    chosen = settings(tiny_llama)
    held_out = token_windows.calibration(
        sources.source("world"), processors.tokenizer(tiny_llama, chosen), 32, 32, seed=0
    )[28:]
    states = []
    for folder in (tiny_llama, tmp_path / "reconstruct/model"):
        model, found = AutoModelForCausalLM.from_pretrained(folder), []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, out, found=found: found.append(out))
        model(input_ids=held_out)
        states.append(found)
    for row, dense, sparse in zip(rows, *states, strict=True):
        relative = (dense - sparse).norm(dim=-1) / dense.norm(dim=-1)
        assert row["error_after"] == pytest.approx(relative.square().mean().sqrt().item(), rel=1e-4)


@pytest.mark.slow
def test_a_trained_model_recovers_most_of_its_perplexity(stories, hub, tmp_path):
    more = (f"mirror={hub}", "calibration.dataset=local/stories", "calibration.seq_len=128", "calibration.samples=64")
    more += ("reconstruct.samples=64", "reconstruct.batch_size=8", "reconstruct.accumulate=1", "reconstruct.lr=0.05")
    pruned(stories, tmp_path / "prune", *more)
    reconstructed(stories, tmp_path, *more)
    chosen = settings(stories)
    text = token_windows.joined(
        sources.source("local/stories", str(hub), "test"), processors.tokenizer(stories, chosen)
    )
    dense, before, after = (
        window_losses(full_logits(loading.load(folder, chosen)), windows(text, 128)[:24], 8).mean()
        for folder in (stories, tmp_path / "prune/model", tmp_path / "reconstruct/model")
    )
    assert before - after > 0.6 * (before - dense)


def test_bfloat16_weights_are_trained_in_float32(tiny_llama, tmp_path):
    more = ("dtype=bfloat16", "prune.sparsity=0.5", "reconstruct.lr=0.01")
    masks, _ = pruned(tiny_llama, tmp_path / "prune", *more)
    weights, rows = reconstructed(tiny_llama, tmp_path, *more)
    assert masks.violations(weights.items()) == []
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(row["error_after"] < row["error_before"] for row in rows)


def test_the_masks_are_checked_after_every_step(tiny_llama, tmp_path, monkeypatch):
    masks, _ = pruned(tiny_llama, tmp_path / "prune")
    checked = []
    monkeypatch.setattr(
        layer_fit, "violation_of", lambda name, weight, mask: checked.append(bool(weight[~mask].any())) or None
    )
    reconstructed(tiny_llama, tmp_path)
    assert len(checked) == len(masks) * 3 * 7  # epochs and steps; one of eight steps is held out
    assert not any(checked)


def test_a_layer_that_does_not_improve_is_unchanged(tiny_llama, tmp_path, capsys):
    _, before = pruned(tiny_llama, tmp_path / "prune")
    weights, rows = reconstructed(tiny_llama, tmp_path, "reconstruct.lr=0")
    assert all(weights[name].equal(before[name]) for name in before)
    assert all(row["error_after"] == row["error_before"] for row in rows)
    assert capsys.readouterr().out.count("no better") == 3


@pytest.mark.parametrize("errors, best", [([1.0, 0.5, 0.9, 0.7], 0.5), ([1.09, 1.1, 1.08, 1.15], 1.08)])
def test_the_best_epoch_is_kept(errors, best):
    """Also of a layer whose outputs are far off: its error varies around the first one, above 1."""
    layer = torch.nn.Linear(4, 4)
    judged = iter(errors)
    seen = []

    def judge():
        seen.append(layer.weight.detach().clone())
        return next(judged)

    found = layer_fit.fit(
        dict(layer.named_parameters()),
        {},
        [range(1)],
        lambda batch: layer(torch.ones(4)).sum(),
        judge,
        lambda total: total,
        3,
        0.1,
        0,
    )
    assert found == (errors[0], best)
    assert layer.weight.equal(seen[errors.index(best)]) and not layer.weight.equal(seen[0])


@pytest.mark.slow
def test_a_killed_run_resumes_at_its_layer(tiny_llama, tmp_path, monkeypatch):
    pruned(tiny_llama, tmp_path / "prune")
    expected, _ = reconstructed(tiny_llama, tmp_path)
    (tmp_path / "reconstruct").rename(tmp_path / "whole")
    begun = []

    def fit(*args, original=layer_fit.fit):
        begun.append(1)
        if len(begun) == 2:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(layer_fit, "fit", fit)
        reconstructed(tiny_llama, tmp_path)
    first = tmp_path / "reconstruct/model/model-00001-of-00004.safetensors"
    written = first.stat().st_mtime_ns
    weights, rows = reconstructed(tiny_llama, tmp_path)
    assert first.stat().st_mtime_ns == written
    assert len(rows) == 3
    assert all(weights[name].equal(expected[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_reconstruct_as_one_and_all_models_are_reported(tiny_llama, tmp_path):
    chosen = "stages=[prune,reconstruct,finetune,evaluate]"
    launches.run((f"model={tiny_llama}", *QUICK, *SETTINGS, chosen, f"run_dir={tmp_path}/two"), tmp_path / "log", of=2)
    masks, _ = pruned(tiny_llama, tmp_path / "prune")
    one, _ = reconstructed(tiny_llama, tmp_path)
    for name, weight in model_files.tensors(tmp_path / "two/reconstruct/model"):
        torch.testing.assert_close(weight, one[name], rtol=1e-4, atol=1e-4)
    results = json.loads((tmp_path / "two/evaluate/results.json").read_text())["models"]
    assert list(results) == ["dense", "pruned", "reconstructed", "finetuned"]
    assert results["reconstructed"]["mask_violations"] == results["finetuned"]["mask_violations"] == 0
    merged = dict(model_files.tensors(tmp_path / "two/finetune/model"))
    untrained = [
        name for name in one if name not in masks
    ]  # norms differ only if the LoRA started from the reconstructed model
    assert all(torch.allclose(merged[name], one[name], rtol=1e-4, atol=1e-4) for name in untrained)
    assert any(not merged[name].equal(dict(model_files.tensors(tiny_llama))[name]) for name in untrained)


def test_bad_input_says_what_to_set(tiny_llama, tmp_path):
    pruned(tiny_llama, tmp_path / "prune")
    for more, says in [
        (["reconstruct.samples=7"], "set reconstruct.samples=32"),
        (["reconstruct.seq_len=4096"], "reconstruct.seq_len=128"),
        (["reconstruct.dataset=./nowhere"], "no dataset at"),
        (["reconstruct.lr=1e3"], r"model\.layers\.0 diverges, .*: set reconstruct\.lr=100"),
    ]:
        with pytest.raises(UserError, match=says):
            reconstructed(tiny_llama, tmp_path, *more)
    with pytest.raises(UserError, match="reconstruct needs prune in stages"):
        settings(tiny_llama, "stages=[reconstruct]")
    with pytest.raises(UserError, match="set reconstruct.samples=32"):  # before the prune stage begins
        runner.run(settings(tiny_llama, "reconstruct.samples=7", f"run_dir={tmp_path}/run"))
    assert not (tmp_path / "run").exists()
    text = schema.reconstruction_text(settings(tiny_llama))
    with pytest.raises(UserError, match="set reconstruct.accumulate=3 reconstruct.batch_size=1"):
        reconstruct.plan_steps(text, 2, world_size=3)


def test_the_calibration_text_is_the_default(tiny_llama):
    text = schema.reconstruction_text(settings(tiny_llama, "calibration.split=other"))
    assert (text.dataset, text.split, text.samples, text.seq_len, text.batch_size) == ("world", "other", 32, 32, 2)
    text = schema.reconstruction_text(settings(tiny_llama, "reconstruct.dataset=c4", "calibration.split=other"))
    assert (text.dataset, text.split, text.seq_len) == ("c4", "train", 32)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_has_the_same_samples_on_any_number_of_processes(ranks):
    text = schema.Calibration(samples=70, seq_len=8, batch_size=2)
    batches = list(range(35))
    by_rank = [batches[rank::ranks] for rank in range(ranks)]
    steps = reconstruct.plan_steps(text, 4, ranks)
    for number, step in enumerate(steps):
        assert sorted(mine[i] for mine in by_rank for i in step) == batches[4 * number : 4 * number + 4]
    assert sorted(batch for mine in by_rank for batch in mine[steps[-1].stop :]) == batches[4 * len(steps) :]
