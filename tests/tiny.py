"""Random multimodal models, small enough for a test, made from their families' own configurations."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

# by the names that configurations use; all else stays as the family has it
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "num_global_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("hidden_size", "out_hidden_size", "vision_output_dim", "projection_dim"), 32),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 32),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "moe_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "hidden_size_per_layer_input"), 48),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("num_position_embeddings", "position_embedding_size", "max_position_embeddings"), 64),
    **dict.fromkeys(("image_size",), 28),
    **dict.fromkeys(("patch_size",), 14),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
    "pad_token_id": 0,
}
MORE: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": {"model_type": "clip_vision_model"}, "text_config": {"model_type": "llama"}},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "supported_aspect_ratios": [[1, 1]],
        },
    },
    "llama4": {
        "text_config": {"moe_layers": [1], "interleave_moe_layer_step": 2},
        "vision_config": {"pixel_shuffle_ratio": 0.5},
    },
    "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [0]}},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        "vision_config": {"fullatt_block_indexes": [1]},
    },
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}, "text_config": {"per_layer_config": {}}},
    "gemma3": {"mm_tokens_per_image": 4},
}
MULTIMODAL = (
    "gemma3",
    "gemma4",
    "llama4",
    "llava",
    "mistral3",
    "mllama",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
)


def small(config: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            found[key] = small(value)
        elif key in SIZES and isinstance(value, int):
            found[key] = SIZES[key]
        elif key == "layer_types" and value:
            found[key] = [value[0], value[-1]]
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int):
            found[key] = 50 + len(found) % 10
        else:
            found[key] = value
    return found


def multimodal(family: str) -> torch.nn.Module:
    """The whole model of a family, of which no parameter is a constant."""
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[family]
    more = MORE.get(family, {})
    parts = {
        key: kind(**{key: value}).to_dict()[key]
        for key, value in more.items()
        if isinstance(value, dict) and "model_type" in value
    }
    sizes = small(kind().to_dict() | parts)
    for key, value in more.items():
        sizes[key] = sizes[key] | value if isinstance(value, dict) else value
    model = AutoModelForImageTextToText.from_config(kind(**{k: v for k, v in sizes.items() if v is not None})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.tie_weights()
    return model
