"""A compact model on a real GPU gives what the dense one gives, in every form."""

import gc
import json

import pytest
import torch
from torch import nn

from pipeline.commands.main import main
from pipeline.compact.compact_model import CompactLinear, load_compact, make_dense
from pipeline.compact.compact_weight import CompactWeight
from pipeline.compact.forms import BITMASK, DENSE, SEMI_STRUCTURED
from pipeline.compact.gpu_weight import GpuWeight, SemiStructuredWeight, error_of
from pipeline.models import loading
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe
from tests.compact.test_compact import export, prune_
from tests.engine.test_decoder import small_model
from tests.families import save, text

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = tuple(TOLERANCE)


def saved(folder, model: nn.Module, pattern: str, values: str = "exact") -> nn.Module:
    """Writes the pruned model and its compact form; returns the dense model on the GPU."""
    masks = prune_(model, pattern)
    model.save_pretrained(folder / "model")
    export(folder / "model", masks, folder / "compact", values=values)
    return loading.load(folder / "model", Recipe()).cuda()


def a_llama(dtype: torch.dtype) -> nn.Module:
    return small_model("llama", vocab_size=521, hidden_size=128, intermediate_size=192, head_dim=32).to(dtype)


def weights_of(model: nn.Module) -> list[CompactWeight]:
    return [weight for module in model.modules() for weight in module.__dict__.get("_compact", {}).values()]


@torch.no_grad()
def compare(dense: nn.Module, ours: nn.Module, tokens: tuple[int, ...] = (1, 3, 24)) -> None:
    assert ours.device.type == "cuda" and all(buffer.is_cuda for buffer in ours.buffers())
    for number in tokens:
        ids = (text(2 if number == 3 else 1, number) % 60 + 1).cuda()
        expected, found = (model(input_ids=ids, use_cache=False).logits for model in (dense, ours))
        assert error_of(found, expected.double()) <= TOLERANCE[expected.dtype]


@pytest.mark.parametrize("form", [BITMASK, SEMI_STRUCTURED, DENSE, "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_gives_the_logits_of_the_dense_model(tmp_path, dtype, form):
    dense = saved(tmp_path, a_llama(dtype), "2of4")
    ours = load_compact(tmp_path / "compact", device="cuda", form=form)
    compare(dense, ours)
    assert sum(row["matrices"] for row in ours.compact_forms) == 21
    if form == "auto":
        assert all(
            {"1", "16", "512"} == set(map(str, times))
            for row in ours.compact_forms
            for times in row["microseconds"].values()
        )
        return
    chosen = BITMASK if (form, dtype) == (SEMI_STRUCTURED, torch.float32) else form
    kinds = {type(weight) for weight in weights_of(ours)}
    if form == SEMI_STRUCTURED and kinds == {GpuWeight}:
        pytest.skip("this GPU has no semi-structured products")
    assert {row["form"] for row in ours.compact_forms} == {chosen}
    assert kinds == {BITMASK: {GpuWeight}, SEMI_STRUCTURED: {SemiStructuredWeight}, DENSE: set()}[chosen]


@pytest.mark.parametrize("values", ["exact", "int8"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "mixtral", "qwen2_moe", "gpt_oss"])
def test_families_with_conv1d_biases_and_experts(tmp_path, family, values):
    model = save(family, tmp_path / "tokenizer") if family == "gpt_oss" else small_model(family)
    dense = saved(tmp_path, model, "0.5", values)
    ours = load_compact(tmp_path / "compact", device="cuda", form=BITMASK)
    if values == "int8":
        dense = make_dense(load_compact(tmp_path / "compact")).cuda()  # of the rounded weights
    compare(dense, ours)
    assert len(weights_of(ours)) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_greedy_generation(tmp_path, dtype):
    """The tokens are the dense model's; where one is not, the dense model had the two within the tolerance."""
    dense = saved(tmp_path, a_llama(dtype), "0.5")
    ours = load_compact(tmp_path / "compact", device="cuda", form=BITMASK)
    assert isinstance(ours.model.layers[0].mlp.up_proj, CompactLinear)
    ids = torch.arange(3, 40, device="cuda").view(1, -1)
    for how in ({}, {"cache_implementation": "static"}):
        found = ours.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, **how)
        logits = dense(input_ids=found, use_cache=False).logits[0, 36:-1].float()
        lead = logits.max(1).values - logits.gather(1, found[0, 37:, None])[:, 0]
        assert found.shape == (1, 57) and (lead <= 2 * TOLERANCE[dtype] * (1 + logits.abs().max())).all()


@torch.no_grad()
def test_a_captured_step_gives_the_same(tmp_path):
    saved(tmp_path, a_llama(torch.bfloat16), "0.5")
    ours = load_compact(tmp_path / "compact", device="cuda", form=BITMASK)
    layer = ours.model.layers[0].mlp.up_proj
    for tokens in (1, 5):
        x = torch.randn(1, tokens, 128, device="cuda", dtype=torch.bfloat16)
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(x)
        graph.replay()
        assert torch.equal(found, expected)


@torch.no_grad()
def test_large_matrices_and_memory(tmp_path):
    """Of the sizes of a real model; the model takes little more than the compact matrices."""
    more = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
    }
    dense = saved(tmp_path, small_model("llama", num_hidden_layers=2, **more).bfloat16(), "0.5")
    compare(dense, ours := load_compact(tmp_path / "compact", device="cuda", form=BITMASK), (1, 16, 24))
    size = sum(weight.nbytes for weight in weights_of(ours))
    assert size <= 0.60 * sum(
        module.weight.nbytes for module in dense.model.layers.modules() if isinstance(module, nn.Linear)
    )
    del ours
    gc.collect()
    before = requested()
    ours = load_compact(tmp_path / "compact", device="cuda", form=BITMASK)
    others = sum(tensor.nbytes for tensor in (*ours.parameters(), *ours.buffers()))
    gc.collect()
    assert requested() - before <= 1.02 * (size + others) + 2**20


def requested() -> int:
    """Bytes; `memory_allocated` also counts up to a MiB for each tensor that the allocator cannot give to others."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def test_it_stays_where_it_is(tmp_path):
    saved(tmp_path, a_llama(torch.float32), "0.5")
    ours = load_compact(tmp_path / "compact", device="cuda:0", form=BITMASK)
    ours.to("cuda").float()
    for change in (ours.cpu, ours.half):
        with pytest.raises(UserError, match="pass device= to load_compact"):
            change()


def test_the_speed_command(tmp_path, capsys):
    saved(tmp_path, a_llama(torch.bfloat16), "0.5")
    few = ("speed.repeats=1", "speed.new_tokens=8", "speed.batches=[1,4]", "speed.prompt_lengths=[64]")
    arguments = ["speed", str(tmp_path / "model"), str(tmp_path / "compact"), *few, f"out={tmp_path / 'out.json'}"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["machine"]["device"] == "cuda" and "on its GPU" in said and "bitmask, µs" in said
    ordinary, compact = results["models"].values()
    assert not ordinary["forms"] and sum(row["matrices"] for row in compact["forms"]) == 21
    assert all(model["memory_bytes"] > 0 and model["decode"]["4"]["median"] > 0 for model in (ordinary, compact))
    assert results["products"]
