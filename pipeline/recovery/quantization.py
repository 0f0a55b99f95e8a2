"""Quantised base weights under a LoRA (bitsandbytes): how to load them, and how to dequantise them."""

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig


def configuration(kind: str | None) -> BitsAndBytesConfig | None:
    """The quantization_config for from_pretrained. nf4: 4-bit NormalFloat with double quantisation (Dettmers et al. 2023,
    "QLoRA", section 3); int8: one scale per output row. Both keep zeros exactly zero."""
    if kind is None:
        return None
    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return BitsAndBytesConfig(load_in_8bit=True)


def keep_layout_(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights, which it does on a CPU with AVX512-BF16 at a layer's first call in
    evaluation mode. From then on no gradient passes through the layer, so a validation would change the training; and widths
    must be multiples of 64."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantized(weight: Tensor) -> Tensor:
    """The weight in floating point; unquantised weights are returned as they are."""
    if weight.is_floating_point():
        return weight
    import bitsandbytes.functional as bnb

    if weight.dtype == torch.int8:
        return bnb.int8_vectorwise_dequant(weight, weight.SCB)
    return bnb.dequantize_4bit(weight, weight.quant_state)
