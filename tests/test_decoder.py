"""Layer by layer is the whole model, for every family; nothing is known by model name."""

import pytest
import torch
from pipeline.decoder import Decoder, find_layers, matrices
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import UserError

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
ROUTED = ("mixtral", "qwen2_moe")


def small_model(family: str, attention: str | None = None, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | FAMILIES[family] | more)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layer_by_layer_is_the_whole_model(family, attention):
    model = small_model(family, attention)
    ids = torch.randint(3, 61, (2, 24))
    whole = []
    _, layers = find_layers(model)
    hook = layers[-1].register_forward_hook(lambda module, args, out: whole.append(out))
    model(input_ids=ids, use_cache=False)
    hook.remove()
    expected = whole[0][0] if isinstance(whole[0], tuple) else whole[0]
    decoder = Decoder(model)

    hidden = decoder.embed(ids)
    for index, layer in enumerate(decoder.layers):
        hidden = decoder.run(index, layer, hidden)
    if family in ROUTED:  # ours sums the experts in its own order
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(hidden, expected)
    assert len(matrices(decoder.layers[0])) >= 4


def test_a_model_that_is_not_understood_says_what_was_looked_for():
    model = small_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(UserError, match="LlamaForCausalLM is not understood: looked for one list of 5 decoder layers"):
        Decoder(model)


def test_routers_stay_dense_and_every_expert_is_a_matrix():
    layer = Decoder(small_model("qwen2_moe")).layers[0]
    names = set(matrices(layer))
    assert {f"mlp.experts.{which}_proj[{e}]" for which in ("gate_up", "down") for e in range(4)} <= names
    assert {f"mlp.shared_expert.{which}_proj.weight" for which in ("gate", "up", "down")} <= names
    assert not any("shared_expert_gate" in name or name == "mlp.gate.weight" for name in names)
    assert len(names) == 4 + 8 + 3
