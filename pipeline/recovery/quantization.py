"""Quantised base weights under a LoRA (bitsandbytes): how to load them, and how to dequantise them."""

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig


def configuration(kind: str | None) -> BitsAndBytesConfig | None:
    """The quantization_config for from_pretrained. nf4: 4-bit NormalFloat with double quantisation (Dettmers et al. 2023,
    "QLoRA", section 3); int8: one scale per output row. Both keep zeros exactly zero."""
    if kind is None:
        return None
    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return BitsAndBytesConfig(load_in_8bit=True)


def dequantized(weight: Tensor) -> Tensor:
    """The weight in floating point; unquantised weights are returned as they are."""
    if weight.is_floating_point():
        return weight
    import bitsandbytes.functional as bnb

    if weight.dtype == torch.int8:
        return bnb.int8_vectorwise_dequant(weight, weight.SCB)
    return bnb.dequantize_4bit(weight, weight.quant_state)
