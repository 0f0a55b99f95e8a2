"""Decoding steps of a Llama whose matrices are dense or compact, on a GPU: for compact_gpu.py."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.compact_gpu_timing import FORMS, another, call_seconds, forms_of, graph_seconds
from pipeline.compact import compact_model

PATTERNS = ("0.5", "2of4")
CACHE = 512  # positions
STEPS = 40


def llama(layers: int, hidden: int = 4096, mlp: int = 11008, heads: int = 32, device: str = "cuda") -> nn.Module:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).bfloat16().to(device).eval()


def decoding_step(model: nn.Module, batch: int) -> Callable[[], Tensor]:
    """One token for each text, with a cache of `CACHE` positions of which all are attended to."""
    device = model.lm_head.weight.device
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    inputs = {"input_ids": torch.full((batch, 1), 5, device=device), "past_key_values": cache, "use_cache": True}
    inputs["position_ids"] = torch.full((1, 1), CACHE // 2, device=device)
    inputs["attention_mask"] = torch.ones(batch, 1, 1, CACHE, dtype=torch.bool, device=device)
    if "cache_position" in inspect.signature(model.model.forward).parameters:
        inputs["cache_position"] = torch.full((1,), CACHE // 2, device=device)
    return lambda: model(**inputs).logits


def with_form(model: nn.Module, form: str, pattern: str) -> bool:
    """Gives the layers' matrices their form, in place: equal ones the same weights, each in memory of its own. False if they
    cannot have it."""
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            weight = dict(forms_of(*module.weight.shape, pattern)).get(form)
            if weight is None:
                return False
            if form == "dense":
                module.weight.data.copy_(weight)
            else:
                compact_model._attach(model, [f"model.layers.{name}.weight"], another(weight))
    return True


def weight_bytes(model: nn.Module) -> int:
    compact = (weight for module in model.modules() for weight in module.__dict__.get("_compact", {}).values())
    return sum(weight.nbytes for weight in (*model.parameters(), *compact))


def decoding(layers: int, write: Callable[[dict], None]) -> None:
    """A line for each pattern, form and batch size: a step without a CUDA graph, and with one."""
    print(f"\n{layers} layers:\n| pattern | batch | form | weights, MiB | eager, ms | graph, ms | × dense, graph |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for pattern in PATTERNS:
        dense_seconds: dict[int, float] = {}
        for form in FORMS:
            model = llama(layers)
            if not with_form(model, form, pattern):
                continue
            for batch in (1, 4, 16):
                eager = call_seconds(decoding_step(model, batch), STEPS)
                try:
                    graph = graph_seconds(decoding_step(model, batch), STEPS)
                except RuntimeError as error:
                    print(f"no graph of a step: {str(error).splitlines()[0][:200]}")
                    graph = float("nan")
                gain = dense_seconds.setdefault(batch, graph) / graph
                size = weight_bytes(model)
                write(
                    {"decoding": pattern, "batch": batch, "form": form, "eager": eager, "graph": graph, "bytes": size}
                )
                times = f"{1e3 * eager:.2f} | {1e3 * graph:.2f} | {gain:.2f}"
                print(f"| {pattern} | {batch} | {form} | {size / 2**20:.0f} | {times} |", flush=True)
