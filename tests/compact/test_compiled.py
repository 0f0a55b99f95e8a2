"""Compact products in torch.compile, and compiled decoding: the same results as without."""

import copy

import pytest
import torch

from pipeline.commands.export import export
from pipeline.compact import compiled, kernels
from pipeline.compact.compact_model import load_compact
from pipeline.models import loading
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe
from tests.compact.test_compact import prune_
from tests.compact.test_compact_model import DTYPES, TOLERANCE, a_matrix
from tests.engine.test_decoder import small_model
from tests.families import FAMILIES, text, tiny


@pytest.fixture(autouse=True)
def forget_other_graphs():
    """Beyond eight graphs of a function, torch runs it without compiling."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def folders(tmp_path, family: str, values: str = "exact", dtype: torch.dtype = torch.float32):
    """An ordinary and a compact folder of the same small pruned model."""
    model = small_model(family).to(dtype)
    masks = prune_(model, "0.5")
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", masks, tmp_path / "compact", values=values)
    return tmp_path / "model", tmp_path / "compact"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["exact", "int8"])
def test_what_torch_compile_knows_of_the_operators(dtype, values):
    """Their shapes and strides, symbolic ones too, and that they change nothing but `out`."""
    if kernels.load() is None:
        pytest.skip("no kernels here")
    operators, checks = kernels.load(), ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    weight, compact = a_matrix(24, 104, 0.5, dtype, values)
    parts = (compact.mask, compact.values, compact.scales, compact.offsets)
    for bias in (None, torch.randn(24).to(dtype)):
        for x in (torch.randn(104), torch.randn(2, 3, 104)):
            torch.library.opcheck(operators.product.default, (*parts, x.to(dtype), bias), test_utils=checks)
            torch.library.opcheck(operators.dense.default, (weight, x.to(dtype), bias), test_utils=checks)
        torch.library.opcheck(
            operators.prefill.default, (*parts, torch.randn(30, 104).to(dtype), bias), test_utils=checks
        )
    torch.library.opcheck(operators.expand.default, (*parts, torch.empty_like(weight)), test_utils=checks)


@pytest.mark.slow
@pytest.mark.parametrize("family, values", [("llama", "exact"), ("gpt2", "int8")])
@torch.no_grad()
def test_a_compact_model_is_traced_as_one_graph(tmp_path, family, values):
    """Linear and Conv1D, for few and for many tokens."""
    if kernels.load() is None:
        pytest.skip("no kernels here")
    model = load_compact(folders(tmp_path, family, values)[1])
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    for tokens in (1, 5, 40):
        ids = torch.arange(3, 3 + tokens).view(1, -1)
        assert torch.equal(traced(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_decoding(tmp_path):
    """Ordinary and compact, two texts of which one is padded, longer than what was compiled first."""
    ordinary, compact = folders(tmp_path, "llama", dtype=torch.bfloat16)
    ids = torch.arange(3, 43).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for load in (lambda: loading.load(ordinary, Recipe()), lambda: load_compact(compact)):
        expected, found = load(), compiled.compile_decoding(load())
        for tokens in (8, 30):
            how = {"attention_mask": mask, "max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
            out = found.generate(ids, pad_token_id=0, **how)
            assert out.shape == (2, 20 + tokens)
            all_of_it = torch.cat([mask, torch.ones(2, tokens, dtype=torch.long)], 1)
            logits = expected(input_ids=out, attention_mask=all_of_it, use_cache=False).logits[:, 19:-1].float()
            # a token that is not the ordinary model's choice was within the tolerance of it
            lead = logits.max(-1).values - logits.gather(-1, out[:, 20:, None])[..., 0]
            assert (lead <= 2 * TOLERANCE[torch.bfloat16] * (1 + logits.abs().max())).all()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
def test_attention_for_one_token_is_sdpa(heads, groups):
    module = torch.nn.Module()
    module.num_key_value_groups = heads // groups
    query, key, value = torch.randn(2, heads, 1, 16), torch.randn(2, groups, 9, 16), torch.randn(2, groups, 9, 16)
    mask = torch.rand(2, 1, 1, 9) < 0.6
    mask[..., 3] = True
    for scaling in (None, 0.3):
        given = (module, query, key, value, mask)
        found, _ = compiled._attention(*given, scaling=scaling)
        expected, _ = compiled.sdpa_attention_forward(*given, scaling=scaling)
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-6)


def test_what_cannot_be_compiled_is_refused(tmp_path, monkeypatch):
    _, compact = folders(tmp_path, "mixtral")
    with pytest.raises(UserError, match="Mixtral.* runs one compact expert at a time"):
        load_compact(compact, compiled=True)
    for family in ("gpt_neo", "llama4_text"):
        with pytest.raises(UserError, match="transformers cannot compile the decoding of (GPTNeo|Llama4)"):
            compiled.compile_decoding(tiny(family))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs a C.. compiler, and no-such-compiler is not installed"):
        compiled.compile_decoding(small_model("llama"))


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", "deepseek_v32", "dots3_note_text"])
@torch.no_grad()
def test_the_attention_computes_the_same(family):
    """Also that of models which mask tokens only if the attention is called sdpa."""
    if family not in FAMILIES:
        pytest.skip(f"this version of transformers has no {family}")
    model, ids = tiny(family), text(3, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    how = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    how |= {"cache_implementation": "static", "disable_compile": True}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **how)
    compiled.compile_decoding(model)
    assert (model.config._attn_implementation == compiled.ATTENTION) == (family in ("llama", "qwen3_5_text"))
    found = model.generate(ids, **how)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_copy_decodes_with_its_own_weights():
    model, ids = compiled.compile_decoding(tiny("llama")), text(1, 5)
    model.generation_config.compile_config.backend = "eager"
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    model.generate(ids, **how)
    for again in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        again.lm_head.weight.data = -model.lm_head.weight.data
        expected = tiny("llama")
        expected.lm_head.weight.data = -expected.lm_head.weight.data
        assert torch.equal(again.generate(ids, **how), expected.generate(ids, **how))
