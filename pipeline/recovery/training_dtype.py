"""The dtypes of training: of the computation, the trained weights and the frozen weights."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pipeline.registry import FINETUNE_METHODS
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune


def precision(setting: str) -> str:
    """Lightning's `precision` for the setting. `auto` is 32-true on a CPU, bf16-mixed on a GPU, and 16-mixed on a GPU that only
    emulates bfloat16 (V100, T4). Raises `UserError` for 16-mixed on a CPU, where Lightning would train in bf16-mixed."""
    if setting == "16-mixed" and not torch.cuda.is_available():
        raise UserError("finetune.precision=16-mixed needs a GPU, and there is none: set finetune.precision=bf16-mixed")
    if setting != "auto":
        return setting
    if not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def mixed_dtype(setting: str) -> torch.dtype | None:
    """The dtype of matrix products under autocast; None without autocast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision(setting))


def trains_in_float32(settings: Finetune) -> bool:
    """Whether the model's weights are trained, and in float32: small steps would be lost in bfloat16's 8 bits."""
    return FINETUNE_METHODS.entry(settings.method).trains_weights and settings.precision != "bf16-true"


def in_float32(module: nn.Module) -> nn.Module:
    """Converts the parameters in place, one at a time. Skips sharded ones, which are already converted."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()
    return module


def weights_dtype(settings: Finetune, stored: str) -> str | None:
    """The dtype in which to load the weights of the trained model; None if it is `stored`."""
    return "float32" if trains_in_float32(settings) else frozen_dtype(settings, stored)


def frozen_dtype(settings: Finetune, stored: str) -> str | None:
    """The dtype in which to load frozen weights; None if it is `stored`, the dtype of their files.

    float16 weights (LLaMA and OPT) are loaded in bfloat16 if autocast computes in bfloat16, and the reverse. Otherwise
    autocast would keep a second copy of each weight for backward, and float16 norms would make the residual stream float32.
    """
    wanted = str(mixed_dtype(settings.precision)).removeprefix("torch.")
    return wanted if {stored, wanted} == {"float16", "bfloat16"} else None
