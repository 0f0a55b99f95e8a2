"""A tiny random model of every family of transformers: `tiny("gemma4_text")`.

A family is a model type such as `llama`, with a variant (`gemma4_text:moe`) if its models differ in kind, or with `:whole` for
a multimodal checkpoint as on the hub. All accept tokens in `TEXT` and have a hidden size of 64.
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

from tests.family_sizes import DEPTH, EXACTLY, LAYERS, SETTINGS, SIZES, TOKEN, VOCABULARY

TEXT = (3, 480)  # special tokens are below, image and audio placeholders above
TOO_LARGE = 60e6  # weights: more means that the rules in family_sizes.py miss a size

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


def tiny(name: str, **more: Any) -> nn.Module:
    """The model of a family in float32 and evaluation mode, deterministic; every parameter influences the output. `more` is
    added to its configuration.

    Raises transformers' error if it cannot build the model: `gemma3n` needs timm, for example.
    """
    auto = AutoModelForImageTextToText if name.endswith(":whole") else AutoModelForCausalLM
    small = configuration(name)
    for key, value in more.items():
        setattr(small, key, value)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in auto.from_config(small).parameters())
    if weights > TOO_LARGE:
        raise ValueError(f"{name} has {weights / 1e6:.0f} million weights: a size is missing in tests/family_sizes.py")
    torch.manual_seed(0)
    model = auto.from_config(small).float().eval()
    randomise(model)
    model.tie_weights()
    return model


def save(name: str, folder: Path) -> nn.Module:
    """Saves the model of a family for `from_pretrained`, with a tokenizer of the words "3", "4" and so on."""
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
    # None means unset, and may be derived from other fields; without q_lora_rank DeepSeek's queries are not factored
    return kind(**{field: value for field, value in fields.items() if value is not None or field == "q_lora_rank"})


def _shrunk(fields: dict[str, Any], layers: int, tokens: dict[str, int]) -> dict[str, Any]:
    depths = [value for field, value in fields.items() if DEPTH.fullmatch(field) and isinstance(value, int)]
    # per_layer_config is derived from the layers' types
    fields = {field: value for field, value in fields.items() if field != "per_layer_config"}
    return {field: _small(field, value, layers, depths, tokens) for field, value in fields.items()}


def _small(field: str, value: Any, layers: int, depths: list[int], tokens: dict[str, int]) -> Any:
    """A field's value for a model with `layers` layers. `tokens`: the ids assigned so far to special tokens, by field."""
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
    """The settings of the first layers, including the first layer of each later kind."""
    first = [i for i, value in enumerate(values) if value not in values[:i]]
    rest = [i for i in range(len(values)) if i not in first]
    return [values[i] for i in sorted((first + rest)[:layers])]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Randomises all parameters and saved buffers, because a new model's norms, biases and gates are ones and zeros. Except
    convolutions and embeddings, which are random already, and the sensitive decay of state space models."""
    saved = set(model.state_dict(keep_vars=True).values())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor not in saved or re.search(r"A_log|conv|embed|dt_bias", name):
            continue
        if not tensor.is_floating_point():
            if "tid2eid" in name:  # the expert of each token: all 0 in a new DeepSeek V4
                tensor.copy_(torch.randint(0, 4, tensor.shape))
        elif tensor.dim() >= 2 and tensor.numel() > 64:
            tensor.copy_(torch.randn(tensor.shape) * 0.8 / tensor.shape[-1] ** 0.5)
        else:
            tensor.add_(torch.randn(tensor.shape) * 0.1)
