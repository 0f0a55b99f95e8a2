"""Owns the quantised weights under a LoRA: how a model is loaded with them, and what they stand for (bitsandbytes)."""

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig


def configuration(kind: str | None) -> BitsAndBytesConfig | None:
    """For from_pretrained. nf4: 4-bit NormalFloat with doubly quantised constants (Dettmers et al. 2023, "QLoRA", section
    3); int8: a scale for each output row. Both keep a zero exactly zero."""
    if kind is None:
        return None
    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return BitsAndBytesConfig(load_in_8bit=True)


def dequantized(weight: Tensor) -> Tensor:
    """The weight in floating point: itself where it is not quantised."""
    if weight.is_floating_point():
        return weight
    import bitsandbytes.functional as bnb

    if weight.dtype == torch.int8:
        return bnb.int8_vectorwise_dequant(weight, weight.SCB)
    return bnb.dequantize_4bit(weight, weight.quant_state)
