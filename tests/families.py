"""A tiny random model of every family of transformers: `tiny("gemma4_text")`.

A family is a model type, such as `llama`; with a variant (`gemma4_text:moe`) where a family has kinds that differ; or with
`:whole`, a multimodal checkpoint as it lies on the hub. All take text of tokens in `TEXT`, and are 64 wide.
"""

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, LAYERS = 512, 4
TEXT = (3, 480)  # below lie the special tokens, above the places of images and sounds
TOO_LARGE = 60e6  # weights: a size that the rules below do not know

# Sizes by the names of a configuration's fields, of which the first that matches holds. A size of 0 (off) stays 0.
SIZES = {
    r"(unpadded_|decoder_)?vocab_size(_per_layer_input)?": VOCABULARY,
    r"hidden_size|d_model|n_embd|emb_dim|embedding_(dim|size)|(in|out)put_embedding_size|word_embed_proj_dim|lru_width": 64,
    r"(attention|router)_hidden_size|hidden_size_global|adapter_(in_dim|out_dim|input_size)": 64,
    r"(dense_)?intermediate_size(_mlp)?|((de|en)coder_)?ffn_dim|d_inner|dff|dim_ff|(ffn|feed_forward)_(hidden_)?size": 96,
    r"expert_ffn_hidden_size|\w+_intermediate_size": 48,
    r"kv_lora_rank|q_lora_rank": 32,
    r"hidden_size_per_layer_input|\w*(_d_head|head_dim|headdim|_state|state_size|_rank|_lowrank|ple_embed_dim)": 16,
    r"attention_head_size|d_head|dim_head|kv_channels|query_pre_attn_scalar|keep_window_size": 16,
    r"(mamba_)?chunk_size|\w*window(_size)?|local_attention|attention_chunk_size|index_(topk|block_size)|rotary_dim": 8,
    r"mamba_(n|num)_heads": 8,
    r"\w*(key_value|kv|linear_num_key)_heads|index(er)?_n_heads|o_groups|num_experts_per_tok(en)?|moe_(topk|k)": 2,
    r"\w*(attention|value|^n|num|^)_?heads?|(en|de)coder_layers|num_encoder_layers|heads_per_ngram|num_random_blocks": 4,
    r"(num|n_routed|num_local|moe_num)_experts": 4,
    r"\w*position_embeddings|n_positions|max_seq_len|context_length|n_ctx|\w+_positions|model_max_length|mamba_d_ssm": 128,
    r"rel_extent": 128,
    r"(mamba_)?n?_?groups?|topk_group|num_expert_group|first_k_dense_replace|(bos|decoder_start)_token_id": 1,
    r"eos_token_id": 2,
    r"pad_token_id": 0,
}
# before the rules: heads of 16 are what 4 heads in 64 make, but rotary and other halves of a head are not whole heads
EXACTLY = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "mamba_ngroups": 1, "mamba_n_groups": 1, "n_group": 1}
DEPTH = re.compile(r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|num_blocks")
TOKEN = re.compile(r"\w+_token_(id|index)")

SLIDING = ["sliding_attention", "full_attention"]
LATENT = {"head_dim": 8}  # multi-head latent attention: the rotary part of a head
EVERY_HEAD = {"num_key_value_heads": 4}
DEEPSEEK_V2 = LATENT | {"num_experts_per_tok": 2, "first_k_dense_replace": 1}
GEMMA_4_E = {"num_hidden_layers": 6, "layer_types": SLIDING * 3, "num_kv_shared_layers": 2, "global_head_dim": 32}
GEMMA_4 = {"global_head_dim": 32, "layer_types": SLIDING * 2, "hidden_size_per_layer_input": 0}
ZAMBA = EVERY_HEAD | {
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
    "attention_head_dim": 32,
    "attention_hidden_size": 128,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN_4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "ngram_vocab_size_base": 200,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
# What the rules do not know: settings that belong together, and those of a variant.
SETTINGS: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT | EVERY_HEAD,
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v2:lite": DEEPSEEK_V2 | {"q_lora_rank": None},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | EVERY_HEAD,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": EVERY_HEAD | {"per_layer_config": {}}},
    "dots3_note_text": EVERY_HEAD | {"per_layer_config": {}},
    "falcon": {"new_decoder_architecture": True},
    "falcon:7b": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "falcon:rw": {
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "num_kv_heads": 4,
    },
    "falcon_mamba": {"time_step_rank": 4},
    "gemma2": {"layer_types": SLIDING * 2},
    "gemma3_text": {"layer_types": SLIDING * 2},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": SLIDING * 3,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 6,
        "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
    },
    "gemma4": {"text_config": GEMMA_4_E},
    "gemma4:whole": {
        "text_config": GEMMA_4_E,
        "vision_config": VISION
        | {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16, "position_embedding_size": 64},
    },
    "gemma4_text": GEMMA_4_E,  # as E2B and E4B
    "gemma4_text:31b": GEMMA_4 | {"attention_k_eq_v": True},
    "gemma4_text:moe": GEMMA_4  # as 26B-A4B
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "gemma4_unified_text": {"layer_types": SLIDING * 2},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | EVERY_HEAD,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text:interleaved": {"interleave_moe_layer_step": 2, "moe_layers": [1, 3]},
    "longcat_flash": LATENT | {"num_hidden_layers": None},
    "mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16, "layer_types": SLIDING * 2},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "opt:350m": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "qwen2_5_vl:whole": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}}},
    "qwen4_exp": {"text_config": QWEN_4},
    "qwen4_exp_text": QWEN_4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {  # without a seed it hashes anew in each forward
        "hash_seed": 0,
        "is_decoder": True,
        "num_hidden_layers": 2,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "vaultgemma": {"layer_types": SLIDING * 2},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": ZAMBA | {"mamba_dt_rank": 4},
    "zamba2": ZAMBA
    | {"hybrid_layer_ids": [2, 4], "n_mamba_heads": 8, "mamba_headdim": 16, "num_query_groups": 4, "kv_channels": 16},
    "zaya": {"num_experts_per_tok": 1},
}
WHOLE = (
    "gemma3",
    "gemma4",
    "llama4",
    "mllama",
    "mistral3",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "llava",
)
FAMILIES = (
    *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    *(name for name in SETTINGS if ":" in name and not name.endswith(":whole")),
    *(f"{name}:whole" for name in WHOLE),
)


def tiny(name: str) -> nn.Module:
    """The model of a family in float32 and evaluation mode, always the same; every parameter matters to what it gives.

    Raises what transformers raises where it cannot build one of these sizes: `gemma3n` needs timm, for example.
    """
    auto = AutoModelForImageTextToText if name.endswith(":whole") else AutoModelForCausalLM
    small = configuration(name)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in auto.from_config(small).parameters())
    if weights > TOO_LARGE:
        raise ValueError(f"{name} has {weights / 1e6:.0f} million weights: a size is missing in tests/families.py")
    torch.manual_seed(0)
    model = auto.from_config(small).float().eval()
    randomise(model)
    model.tie_weights()
    return model


def save(name: str, folder: Path) -> nn.Module:
    """Writes the model of a family as a folder for `from_pretrained`, with a tokenizer of words "3", "4" and so on."""
    model = tiny(name)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="3"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="3", bos_token="1", eos_token="2", pad_token="0"
    ).save_pretrained(folder)
    return model


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, (rows, length)."""
    return torch.randint(*TEXT, (rows, length), generator=torch.Generator().manual_seed(seed))


def configuration(name: str) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[name.partition(":")[0]]
    fields = _shrunk(kind().to_dict(), LAYERS, {})
    for field, value in SETTINGS.get(name, {}).items():
        nested = field.endswith("_config") and isinstance(fields.get(field), dict)
        fields[field] = fields[field] | value if nested else value
    # what is None was not set, and may be worked out of the rest; without a rank DeepSeek's queries are not factored
    return kind(**{field: value for field, value in fields.items() if value is not None or field == "q_lora_rank"})


def _shrunk(fields: dict[str, Any], layers: int, tokens: dict[str, int]) -> dict[str, Any]:
    depths = [value for field, value in fields.items() if DEPTH.fullmatch(field) and isinstance(value, int)]
    fields = {
        field: value for field, value in fields.items() if field != "per_layer_config"
    }  # made of the layers' types
    return {field: _small(field, value, layers, depths, tokens) for field, value in fields.items()}


def _small(field: str, value: Any, layers: int, depths: list[int], tokens: dict[str, int]) -> Any:
    """A field's value for a model of so many `layers`; `tokens` are the ids given so far to special tokens, by field."""
    if isinstance(value, dict) and isinstance(value.get("model_type"), str):
        return _shrunk(value, 2 if re.search("vision|audio", field) else layers, tokens)
    if isinstance(value, list) and len(value) in depths:
        return _kinds(value, layers)
    if type(value) is not int:
        return 2 if field == "eos_token_id" and value is not None else value
    if DEPTH.fullmatch(field):
        return layers
    size = EXACTLY.get(field) or next((size for names, size in SIZES.items() if re.fullmatch(names, field)), None)
    if size is not None:
        return size if value or TOKEN.fullmatch(field) else 0
    if TOKEN.fullmatch(field) and value >= VOCABULARY:
        return tokens.setdefault(field, VOCABULARY - 1 - len(tokens))
    return value


def _kinds(values: list, layers: int) -> list:
    """The settings of the first layers, and of the first layer of each kind that comes later."""
    first = [i for i, value in enumerate(values) if value not in values[:i]]
    rest = [i for i in range(len(values)) if i not in first]
    return [values[i] for i in sorted((first + rest)[:layers])]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Gives each parameter, and each buffer that is saved, numbers that matter: a new model's norms, biases and gates are
    ones and zeros. What a convolution or an embedding has is random as it is, and the decay of a state space is delicate."""
    saved = set(model.state_dict(keep_vars=True).values())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor not in saved or re.search(r"A_log|conv|embed|dt_bias", name):
            continue
        if not tensor.is_floating_point():
            if "tid2eid" in name:  # the expert of each token, which is 0 in a new DeepSeek V4
                tensor.copy_(torch.randint(0, 4, tensor.shape))
        elif tensor.dim() >= 2 and tensor.numel() > 64:
            tensor.copy_(torch.randn(tensor.shape) * 0.8 / tensor.shape[-1] ** 0.5)
        else:
            tensor.add_(torch.randn(tensor.shape) * 0.1)
