"""Measures a compact model against the same pruned model dense, on this machine, and prints tables.

    python benchmarks/speed.py --shape 0.1b --sparsity 0 0.3 0.5 0.7 0.9 2of4 --threads 1 2 --work /tmp/espalier-speed

A Llama of random weights, pruned by magnitude. Whole generation with KV cache at batch 1, greedy; prefill; single products by
shape, over copies that together exceed the processor's cache. `own dense` is a dense kernel of the same make as the compact
one, so that the gain of sparsity is told from that of a better kernel. All are timed alternately, and medians are shown, with
the least and the most of the ratios. A busy machine distorts them: its load is printed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.commands.export import export
from pipeline.compact import kernels
from pipeline.compact.compact_model import FewTokensLinear, load_compact
from pipeline.compact.compact_weight import CompactWeight
from pipeline.compact.file_format import compress
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
PRODUCTS = ((576, 576), (2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096))
COLD = 150e6  # bytes of the copies of a matrix


def write_model(folder: Path, shape: str, dtype: torch.dtype, sparsity: str) -> Masks:
    hidden, mlp, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        dtype=dtype,
    )
    torch.manual_seed(0)
    model, masks = LlamaForCausalLM(config).to(dtype), Masks()
    for name, matrix in matrices_of(model).items():
        mask = torch.ones(matrix.weight_OI.shape, dtype=torch.bool)
        if sparsity != "0":
            mask = parse(sparsity).select(matrix.weight_OI.float().abs())
        apply_(matrix.weight_OI, mask)
        masks.add(name, mask, sparsity)
    model.save_pretrained(folder)
    return masks


def alternately(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def with_own_dense(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FewTokensLinear
    return model


def resident(which: str, folder: Path) -> dict[str, float]:
    """MiB of a process that loaded a model and made one step, and the seconds to load."""
    code = (
        "import sys, json, time, torch, psutil; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from pipeline import models, compact_model, kernels; from pipeline.settings.schema import Recipe; kernels.load()\n"
        "before, started = psutil.Process().memory_info().rss, time.perf_counter()\n"
        "folder = Path(sys.argv[3])\n"
        "model = compact_model.load_compact(folder) if sys.argv[2] == 'compact' else models.load(folder, Recipe())\n"
        "loaded = time.perf_counter() - started\n"
        "with torch.no_grad(): model(input_ids=torch.tensor([[5]]))\n"
        "print(json.dumps([(psutil.Process().memory_info().rss - before) / 2**20, loaded]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), which, str(folder)], capture_output=True, text=True, check=True
    )
    mib, seconds = json.loads(done.stdout.splitlines()[-1])
    return {"mib": mib, "load": seconds}


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@torch.no_grad()
def generation(work: Path, shape: str, dtype: torch.dtype, sparsity: str, threads: list[int], new: int, repeats: int):
    for folder in (work / "model", work / "compact"):
        shutil.rmtree(folder, ignore_errors=True)
    masks = write_model(work / "model", shape, dtype, sparsity)
    before, after = export(work / "model", masks, work / "compact")
    row = {
        "share": after / before,
        "disk": bytes_of(work / "compact") / bytes_of(work / "model"),
        "dense": resident("dense", work / "model"),
        "compact": resident("compact", work / "compact"),
    }
    print(
        f"{shape} {dtype} {sparsity}: pruned matrices {row['share']:.3f} of their bytes, files {row['disk']:.3f}; resident "
        f"{row['dense']['mib']:.0f} -> {row['compact']['mib']:.0f} MiB; load {row['dense']['load']:.2f} -> "
        f"{row['compact']['load']:.2f} s",
        flush=True,
    )
    several = {
        "torch": loading.load(work / "model", Recipe()),
        "own dense": with_own_dense(loading.load(work / "model", Recipe())),
        "compact": load_compact(work / "compact"),
    }
    ids, long = torch.arange(5, 21).view(1, -1), torch.randint(5, 2000, (1, 512))
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    for count in threads:
        torch.set_num_threads(count)
        out = {name: model.generate(ids, **how)[0, 16:] for name, model in several.items()}
        same = int((out["torch"] == out["compact"]).sum())
        seconds = alternately(
            {name: lambda m=model: m.generate(ids, **how) for name, model in several.items()}, repeats
        )
        table(f"  {count} threads, {new} tokens ({same} the same)", seconds, lambda s: f"{new / s:7.1f} tokens/s")
        prefill = {name: several[name] for name in ("torch", "compact")}
        seconds = alternately({n: lambda m=m: m(input_ids=long, logits_to_keep=1) for n, m in prefill.items()}, repeats)
        table(f"  {count} threads, prefill of 512", seconds, lambda s: f"{512 / s:7.0f} tokens/s")


def table(title: str, seconds: dict[str, list[float]], shown: Callable[[float], str]) -> None:
    parts = [f"{name} {shown(statistics.median(times))}" for name, times in seconds.items()]
    for name in seconds:
        if name != "compact":
            ratios = sorted(one / other for one, other in zip(seconds[name], seconds["compact"]))
            parts.append(f"{name}/compact {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"{title}: " + ", ".join(parts), flush=True)


@torch.no_grad()
def products(dtype: torch.dtype, sparsity: str, threads: list[int], repeats: int) -> None:
    operators = kernels.load()
    for rows, columns in PRODUCTS:
        weight = torch.randn(rows, columns).to(dtype)
        mask = torch.ones(weight.shape, dtype=torch.bool) if sparsity == "0" else parse(sparsity).select(weight.abs())
        apply_(weight, mask)
        compact = CompactWeight.from_compact(compress("w", weight, mask, False, (sparsity,)), dtype)
        copies = max(1, int(COLD / weight.nbytes))
        dense = [weight.clone() for _ in range(copies)]
        packed = [
            CompactWeight(compact.mask.clone(), compact.values.clone(), compact.offsets, columns, False)
            for _ in range(copies)
        ]
        for count in threads:
            torch.set_num_threads(count)
            x = torch.randn(1, columns).to(dtype)
            calls = {"torch": lambda x=x, dense=dense: [F.linear(x, it) for it in dense]}
            if operators is not None:
                calls["own dense"] = lambda x=x, dense=dense: [operators.dense.default(it, x, None) for it in dense]
            calls["compact"] = lambda x=x, packed=packed: [it.linear(x) for it in packed]
            seconds = alternately(calls, repeats)
            title = f"  {rows} x {columns} {dtype} {sparsity}, {count} threads"
            table(title, seconds, lambda s, copies=copies: f"{1e6 * s / copies:6.0f} us")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", nargs="*", default=["0.1b"], choices=SHAPES)
    arguments.add_argument("--sparsity", nargs="+", default=["0", "0.3", "0.5", "0.7", "0.9", "2of4"])
    arguments.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    arguments.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    arguments.add_argument("--tokens", type=int, default=200)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--products", action="store_true", help="single products by shape too")
    arguments.add_argument("--work", type=Path, required=True, help="a folder, made and removed")
    given = arguments.parse_args()
    print(f"{kernels.best()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    given.work.mkdir(parents=True)
    try:
        for name in given.dtype:
            dtype = getattr(torch, name)
            for sparsity in given.sparsity:
                for shape in given.shape:
                    generation(given.work, shape, dtype, sparsity, given.threads, given.tokens, given.repeats)
                if given.products:
                    products(dtype, sparsity, given.threads, given.repeats)
    finally:
        shutil.rmtree(given.work)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
