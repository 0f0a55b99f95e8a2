"""The models that speed.py compares, and Llamas of random weights to compare them on."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.llama_cpp_model import LlamaCpp, write_gguf
from pipeline.compact.compact_model import FewTokensLinear, load_compact
from pipeline.compact.memory import HugePages
from pipeline.engine.matrices import matrices_of
from pipeline.models import loading
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks, apply_
from pipeline.sparsity.patterns import parse

SHAPES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary
    "tiny": (256, 512, 2, 4, 2, 2048),
    "0.1b": (576, 1536, 30, 9, 3, 49152),
    "0.5b": (2048, 8192, 8, 16, 8, 32000),
}


def build(shape: str) -> nn.Module:
    hidden, mlp, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


@torch.no_grad()
def prune_by_magnitude(model: nn.Module, sparsity: str) -> Masks:
    masks = Masks()
    for name, matrix in matrices_of(model).items():
        mask_OI = torch.ones(matrix.weight_OI.shape, dtype=torch.bool)
        if sparsity != "0":
            mask_OI = parse(sparsity).select(matrix.weight_OI.float().abs())
        apply_(matrix.weight_OI, mask_OI)
        masks.add(name, matrix.stored(mask_OI), sparsity, matrix.transposed)
    return masks


def own_dense(model: nn.Module) -> nn.Module:
    copy = HugePages().copy
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__, module.weight.data = FewTokensLinear, copy(module.weight.data)
    return model


def torch_int8(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(model, {nn.Linear}, torch.qint8)


def llama_cpp(work: Path) -> LlamaCpp:
    write_gguf(loading.load(work / "model", Recipe()), work / "model.gguf")
    return LlamaCpp(work / "model.gguf")


MODELS: dict[str, Callable[[Path], nn.Module | LlamaCpp]] = {  # from WORK
    "torch bf16": lambda work: loading.load(work / "model", Recipe()),
    "own": lambda work: own_dense(loading.load(work / "model", Recipe())),
    "compact": lambda work: load_compact(work / "compact"),
    "int8": lambda work: load_compact(work / "int8"),
    "torch fp32": lambda work: loading.load(work / "model", Recipe(), "float32"),
    "torch int8": lambda work: torch_int8(loading.load(work / "model", Recipe(), "float32")),
    "llama.cpp": llama_cpp,
}
if not all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf")):
    del MODELS["llama.cpp"]
