"""Compiled decoding on a CPU: `generate` with a static cache, whose steps of one token run through torch.compile.

A step of a small model spends more time between its products than in them: Python, and operations of a few microseconds each.
Compiled, they become a few fused kernels. The first step is compiled when it runs, which takes about half a minute.
"""

import functools
import inspect
import re
import shutil
import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.compact import kernels
from pipeline.runtime.errors import UserError

ATTENTION = "sdpa_or_one_token"  # its name in transformers' registry


def compile_decoding(model: nn.Module) -> nn.Module:
    """Sets up `model.generate` to compile its decoding steps, for an ordinary or a compact model on the CPU. Returns the model.

    Raises `UserError` without a compiler, and for models whose step is not one graph: in many pieces, it would be slower.
    """
    name = type(model).__name__
    if shutil.which(kernels.compiler()) is None:
        raise UserError(f"compiled decoding needs a C++ compiler, and {kernels.compiler()} is not installed")
    how = CompileConfig(mode="default")  # by default transformers asks for CUDA graphs
    how._compile_all_devices = True  # by default transformers compiles on GPUs only
    can_compile = model.can_generate() and model._can_compile_fullgraph
    if not can_compile or model.get_compiled_call(how) == model.__call__:  # as for Llama 4
        raise UserError(f"transformers cannot compile the decoding of {name}: decode without compiling")
    if any(weight.experts for module in model.modules() for weight in module.__dict__.get("_compact", {}).values()):
        raise UserError(f"{name} runs one compact expert at a time, which cannot be compiled: decode without compiling")
    if model.config._attn_implementation == "sdpa" and not _asks_for_sdpa(model):
        model.set_attn_implementation(ATTENTION)
    model.get_compiled_call = functools.partial(_compiled_call, model)
    model.generation_config.cache_implementation, model.generation_config.compile_config = "static", how
    return model


def _compiled_call(model: nn.Module, how: CompileConfig) -> Any:
    """The model's own `get_compiled_call`, for this model only: a deep copy takes the result along, and would decode with the
    original's weights."""
    if model.__dict__.get("_compiled_of") != id(model):
        model.__dict__.pop("_compiled_call", None)
        model._compiled_of = id(model)
    return type(model).get_compiled_call(model, how)


def _asks_for_sdpa(model: nn.Module) -> bool:
    """Whether code of the model compares the name of its attention, and so would do something else under our name: sparse
    attention, as of DeepSeek-V3.2, gets its mask only under the names "sdpa" and "eager"."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__} - set(PreTrainedModel.__mro__)
    # that of a module first: finding a class in it takes long
    return any(_names_sdpa(sys.modules.get(cls.__module__)) and _names_sdpa(cls) for cls in classes)


@functools.cache
def _names_sdpa(code: Any) -> bool:
    try:
        return re.search("""["']sdpa["']""", inspect.getsource(code)) is not None
    except (OSError, TypeError):  # no source
        return False


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' sdpa attention, which under torch.compile repeats keys and values for the heads that share them. Here, for
    one token, these heads are rows of one product: 0.07 ms per layer of SmolLM2-135M on a CPU instead of 0.2 ms.

    Shapes: `query` (B, heads, N, D), `key` and `value` (B, groups, S, D), `attention_mask` (B, 1, N, S), True where a token
    attends. Returns (B, N, heads, D).
    """
    batch, heads, tokens, size = query.shape
    is_shared = attention_mask is not None and attention_mask.shape[1] == 1 and options.get("position_bias") is None
    if tokens > 1 or not is_shared or options.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    rows = query.reshape(batch, key.shape[1], -1, size)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
    return out.reshape(batch, heads, 1, -1).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
