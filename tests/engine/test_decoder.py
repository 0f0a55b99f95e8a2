"""Running layer by layer equals running the model, for every family, without rules by model name."""

import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.engine.blocks import find_blocks
from pipeline.engine.coverage import Coverage
from pipeline.engine.layerwise import LayerwiseForwards
from pipeline.engine.matrices import coverage_entries, matrices, matrices_of
from pipeline.runtime.errors import UserError

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GLU = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
GEMMA = {**GLU, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "llama": GLU,
    "mistral": {**GLU, "sliding_window": 8},
    "qwen2": {k: v for k, v in GLU.items() if k != "head_dim"},
    "qwen3": GLU,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi": {"intermediate_size": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {"intermediate_size": 48},
    "bloom": {},
    "mixtral": {**GLU, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **{k: v for k, v in GLU.items() if k != "head_dim"},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    },
}


def small_model(family: str, attention: str | None = None, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | FAMILIES[family] | more)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_block_by_block_equals_the_model_exactly(family, attention):
    model, generator = small_model(family, attention), torch.Generator().manual_seed(1)
    batches = [torch.randint(3, 61, shape, generator=generator) for shape in ((2, 24), (2, 24), (1, 17))]
    expected = [model(input_ids=batch, use_cache=False).logits for batch in batches]
    blocks, order = find_blocks(model), []

    def call(batch):
        return model(input_ids=batch, use_cache=False).logits

    with LayerwiseForwards(model, blocks, call, batches, torch.device("cpu")) as forwards:

        def reached(block):
            order.append(block.name)
            for i in range(len(batches)):
                forwards.run_block(i)  # changes nothing

        results = list(forwards.results(reached))
    assert order == [block.name for block in blocks] and len(order) == 3
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
    assert torch.equal(call(batches[0]), expected[0])  # the blocks are restored
    assert len(matrices(blocks[0], blocks)) >= 4


def test_an_abandoned_paused_forward_frees_its_tensors():
    model = small_model("llama")
    call, batch = (lambda ids: model(input_ids=ids, use_cache=False)), torch.randint(3, 61, (2, 24))
    with LayerwiseForwards(model, find_blocks(model), call, [batch], torch.device("cpu")) as forwards:
        forwards.start()
        waiting = weakref.ref(forwards.forwards[0].args[0])
        assert waiting() is not None
    assert waiting() is None


def test_the_models_own_grad_mode_stays_inside_its_forward():
    model = small_model("llama")

    @torch.enable_grad()
    def call(ids):
        return model(input_ids=ids, use_cache=False).logits

    with LayerwiseForwards(model, find_blocks(model), call, [torch.ones(1, 9).long()], torch.device("cpu")) as forwards:
        forwards.start()
        assert forwards.run_block(0).requires_grad == torch.is_grad_enabled() is True
        with torch.no_grad():
            assert not forwards.run_block(0).requires_grad
            [logits] = forwards.advance() if forwards.current.index == 2 else [torch.zeros(1, requires_grad=True)]
        assert torch.is_grad_enabled() and logits.requires_grad


def test_batches_that_call_different_blocks_are_refused():
    model = small_model("llama")

    def call(ids):
        return model.model.layers[len(ids)](torch.zeros(1, 1, 32))

    batches = [torch.ones(1, 2), torch.ones(2, 2)]
    forwards = LayerwiseForwards(model, find_blocks(model), call, batches, torch.device("cpu"))
    with (
        forwards,
        pytest.raises(UserError, match=r"different paths .* one is at model.layers.1, one at model.layers.2"),
    ):
        forwards.start()


@torch.no_grad()
def test_a_block_that_changes_its_inputs_in_place_is_not_run_twice():
    model = small_model("llama")
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden, **more: forward(hidden.mul_(2), **more)
    call = lambda ids: model(input_ids=ids, use_cache=False)  # noqa: E731
    with LayerwiseForwards(model, find_blocks(model), call, [torch.ones(1, 9).long()], torch.device("cpu")) as forwards:
        forwards.start()
        forwards.run_block(0)
        list(forwards.advance())
        with pytest.raises(UserError, match=r"model.layers.1 changes its inputs in place"):
            forwards.run_block(0)
    assert layer.forward.__name__ == "<lambda>"


def test_a_model_without_blocks_is_refused_with_a_reason():
    with pytest.raises(UserError, match="Sequential is not supported: .* found no list of layers"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_routers_stay_dense_and_every_expert_is_a_matrix():
    model = small_model("qwen2_moe")
    blocks = find_blocks(model)
    names = {name.removeprefix("model.layers.0.") for name in matrices(blocks[0], blocks)}
    assert {f"mlp.experts.{which}_proj[{e}]" for which in ("gate_up", "down") for e in range(4)} <= names
    assert {f"mlp.shared_expert.{which}_proj.weight" for which in ("gate", "up", "down")} <= names
    assert not any("shared_expert_gate" in name or name == "mlp.gate.weight" for name in names)
    assert len(names) == 4 + 8 + 3
    chosen = matrices_of(small_model("qwen2_moe")).keys()
    total = 3 * (4 * 32 + 32 * (32 + 16 + 16 + 32) + 4 * 3 * 16 * 32 + 3 * 24 * 32 + 32)
    assert Coverage(coverage_entries(model, blocks), chosen).describe(chosen) == [
        ("pruned", f"{total - 480:,} of {total:,} weights in the layers' matrices ({1 - 480 / total:.1%})"),
        ("mlp.gate.weight", "stays dense: router (3 x 128 weights)"),
        ("mlp.shared_expert_gate.weight", "stays dense: router (3 x 32 weights)"),
    ]
    none = Coverage(coverage_entries(model, blocks), chosen).rows([])
    assert {row["reason"] for row in none} == {"router", "the model never calls it with calibration text"}
