"""`dataset=self`: text sampled from the dense model, reproducible on any number of processes, and cached."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from pipeline.data import sampled
from pipeline.models import loading, processors
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.sparsity.masks import Masks
from tests import launches
from tests.conftest import PRUNE

SELF = ("calibration.dataset=self", "calibration.samples=20", "calibration.seq_len=24", "calibration.batch_size=4")


def self_text_recipe(model, run_dir, *more):
    return reader.load([f"model={model}", f"run_dir={run_dir}", "stages=[prune]", *more])


def files(runs) -> dict:
    return {path: path.stat().st_mtime_ns for path in (runs / ".sampled").rglob("*.safetensors")}


@pytest.mark.slow
def test_samples_follow_the_models_distribution(tiny_llama):
    """The second token's frequencies equal the model's probabilities, whatever generation_config.json says."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for parameter in model.parameters():
        parameter.data *= 4  # far from uniform
    expected = model(torch.tensor([[0]])).logits[0, -1].softmax(-1)
    model.generation_config = GenerationConfig(temperature=0.1, top_p=0.5, top_k=3)
    samples = torch.cat([sampled.sample_batch(model, 0, 1, 2, seed) for seed in range(200)])
    assert (samples[:, 0] == 0).all()
    counts = torch.bincount(samples[:, 1].long(), minlength=len(expected))
    often = expected * len(samples) > 20
    assert often.sum() > 3
    error = (counts - expected * len(samples)).abs() / (expected * (1 - expected) * len(samples)).sqrt()
    assert error[often].max() < 4.5


def test_a_new_document_begins_after_eos(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.get_output_embeddings().weight[1] += 2 * model.model.norm.weight.mean()  # <eos> comes often
    ids = torch.cat([sampled.sample_batch(model, 0, 1, 60, seed) for seed in range(4)])
    ended = ids[:, :-1] == 1
    assert ended.any() and (ids[:, 1:][ended] == 0).all()
    assert ids.shape == (4 * sampled.BATCH, 60)


@pytest.mark.slow
def test_samples_depend_on_the_seed_and_leave_the_random_state(tiny_llama, tmp_path):
    recipe = self_text_recipe(tiny_llama, tmp_path / "a/run")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = sampled.samples(recipe, tiny_llama, 20, 24)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(8)
    assert torch.equal(first, sampled.samples(self_text_recipe(tiny_llama, tmp_path / "b/run"), tiny_llama, 20, 24))
    other = sampled.samples(self_text_recipe(tiny_llama, tmp_path / "a/run", "seed=1"), tiny_llama, 20, 24)
    assert not (first == other).all(1).any()


@pytest.mark.slow
def test_samples_are_cached_and_a_killed_sampling_resumes(tiny_llama, tmp_path, monkeypatch):
    recipe = self_text_recipe(tiny_llama, tmp_path / "runs/one")
    whole = sampled.samples(recipe, tiny_llama, 40, 16)
    before = files(tmp_path / "runs")
    assert len(before) == 3
    assert torch.equal(sampled.samples(recipe, tiny_llama, 17, 16), whole[:17])
    assert files(tmp_path / "runs") == before
    lost = sorted(before)[1]
    lost.unlink()
    assert torch.equal(sampled.samples(recipe, tiny_llama, 40, 16), whole)
    assert {path for path, time in files(tmp_path / "runs").items() if before[path] != time} == {lost}
    lost.write_bytes(b"x")
    assert torch.equal(sampled.samples(recipe, tiny_llama, 40, 16), whole)
    other = self_text_recipe(tiny_llama, tmp_path / "runs/one", "dtype=bfloat16")
    sampled.samples(other, tiny_llama, 1, 16)
    assert len(files(tmp_path / "runs")) == 4  # another dtype is another model


@pytest.mark.slow
def test_calibration_with_samples_on_any_number_of_processes(tiny_llama, tmp_path, finishes):
    settings = [f"model={tiny_llama}", *SELF]
    one, output = finishes(tmp_path / "one/run", *settings)
    assert "self: the dense model writes 20 samples of 24 tokens" in output
    launches.run((*PRUNE, *settings, f"run_dir={tmp_path}/two/run"), tmp_path / "log", of=2)
    assert (tmp_path / "two/run/prune/masks.safetensors").read_bytes() == one
    _, output = finishes(tmp_path / "one/other", *settings, "prune.method=magnitude")
    assert "the dense model writes" not in output
    Masks.load(tmp_path / "one/other/prune/masks.safetensors").check_patterns()


@pytest.mark.slow
def test_reconstruction_uses_the_dense_models_samples(tiny_llama, tmp_path, typed):
    settings = [
        *SELF,
        "calibration.samples=8",
        "stages=[prune,reconstruct]",
        "reconstruct.accumulate=1",
        "reconstruct.epochs=1",
    ]
    code, output, lines = typed(
        *settings, "reconstruct.batch_size=4", f"model={tiny_llama}", f"run_dir={tmp_path}/runs/run"
    )
    assert code == 0, lines
    assert output.count("the dense model writes") == 1


@pytest.mark.parametrize("key", ["finetune.dataset", "finetune.validation", "evaluate.perplexity"])
def test_samples_are_for_calibration_only(key):
    value = "[self]" if "perplexity" in key else "self"
    with pytest.raises(UserError, match=f"{key}=self: text that the model writes is for calibration only"):
        reader.load(["model=m", "stages=[prune,finetune,evaluate]", f"{key}={value}"])


def test_a_tokenizer_without_a_first_token_is_refused(tiny_llama):
    tokenizer = processors.tokenizer(tiny_llama, self_text_recipe(tiny_llama, "x"))
    config = loading.config(tiny_llama, self_text_recipe(tiny_llama, "x"))
    assert sampled.first_token(tokenizer, config) == 0
    tokenizer.bos_token = None
    assert sampled.first_token(tokenizer, config) == tokenizer.eos_token_id == 1
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="dataset=self needs a begin-of-sequence"):
        sampled.first_token(tokenizer, config)
