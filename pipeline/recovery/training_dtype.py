"""In which dtypes a training computes and keeps its weights."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pipeline.registry import FINETUNE_METHODS
from pipeline.settings.schema import Finetune


def precision(setting: str) -> str:
    """Lightning's `precision`: `auto` is bf16-mixed with a GPU, 16-mixed with one that only emulates bfloat16 (V100, T4), and
    32-true without."""
    if setting != "auto":
        return setting
    if not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def mixed_dtype(setting: str) -> torch.dtype | None:
    """The dtype that products are computed in under autocast; None without."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision(setting))


def trains_in_float32(settings: Finetune) -> bool:
    """Whether the model's own weights train, in float32: steps too small for bfloat16's 8 bits would be lost."""
    return FINETUNE_METHODS.entry(settings.method).trains_weights and settings.precision != "bf16-true"


def in_float32(module: nn.Module) -> nn.Module:
    """Converts parameters one by one, in place; not those that are sharded, which are converted already."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()
    return module


def frozen_dtype(settings: Finetune, stored: str) -> str | None:
    """The dtype to load weights in that do not train, where it is not `stored`, that of their files.

    16-bit weights of the other kind than autocast computes in (LLaMA and OPT are stored in float16) would be kept twice
    for backward, and float16 norms make a bfloat16 residual stream float32.
    """
    wanted = str(mixed_dtype(settings.precision)).removeprefix("torch.")
    return wanted if {stored, wanted} == {"float16", "bfloat16"} else None
