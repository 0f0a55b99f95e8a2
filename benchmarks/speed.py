"""Measures a compact model against the same pruned model dense, on this machine: tables, and a plot of time against sparsity.

    python benchmarks/speed.py --shape 0.1b --work /tmp/speed                                # Llamas of random weights
    python benchmarks/speed.py --model FOLDER --work /tmp/speed                              # a model, pruned by magnitude
    python benchmarks/speed.py --model FOLDER --masks FILE --work /tmp/speed                 # a model that is pruned already
    python benchmarks/speed.py ... --only "torch bf16" own compact int8 --compiled           # steps by torch.compile
    python benchmarks/speed.py ... --only "torch bf16" compact int8 llama.cpp                # see llama_cpp_model.py

Whole generation with KV cache, greedy; prefill; load time and resident memory of a process of its own. `own` is a dense kernel
of the same make as the compact one, over weights in the same kind of memory, so that the gain of sparsity is told from that of
a better kernel. All are timed alternately; medians are shown, with the least and the most of the ratios. A busy machine
distorts them: its load is printed. Each row is added to WORK/speed.jsonl, and the plot (WORK/speed.png) is made of all its
rows, so several short commands may share a folder.
"""

import argparse
import gc
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
from torch import nn

from benchmarks.speed_models import MODELS, SHAPES, build, prune_by_magnitude
from benchmarks.speed_plot import plot
from pipeline.commands.export import export
from pipeline.compact import kernels
from pipeline.compact.compiled import compile_decoding
from pipeline.models import loading
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks

PREFILL = 512  # tokens
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def generation(model: nn.Module, batch: int, tokens: int) -> Callable[[], torch.Tensor]:
    ids = torch.arange(5, 21).repeat(batch, 1)
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how)


def alternately(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = clock()
            call()
            if turn:
                seconds[name].append(clock() - started)
    return seconds


def resident(kind: str, folder: Path) -> dict[str, float]:
    """MiB and seconds that loading a model and one step take in a process of its own. With the step, since what is loaded
    lazily is read there."""
    load = "load_compact(folder)" if kind != "torch bf16" else "loading.load(folder, Recipe())"
    code = (
        "import sys, json, time, torch, psutil; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from pipeline.compact import kernels; from pipeline.compact.compact_model import load_compact\n"
        "from pipeline.models import loading; from pipeline.settings.schema import Recipe\n"
        "kernels.load(); loading.skeleton(Path(sys.argv[2]), Recipe()); folder = Path(sys.argv[2])\n"
        "before, started = psutil.Process().memory_info().rss, time.perf_counter()\n"
        f"model = {load}\n"
        "with torch.no_grad(): model(input_ids=torch.tensor([[5]]))\n"
        "loaded = time.perf_counter() - started\n"
        "print(json.dumps([(psutil.Process().memory_info().rss - before) / 2**20, loaded]))"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    mib, seconds = json.loads(done.stdout.splitlines()[-1])
    return {"mib": mib, "load": seconds}


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class Table:
    """The rows of WORK/speed.jsonl."""

    def __init__(self, work: Path, about: dict[str, object]) -> None:
        self.path, self.about = work / "speed.jsonl", about

    def add(self, what: str, unit: str, seconds: dict[str, list[float]], tokens: int) -> None:
        """One row: seconds by model for `tokens` tokens; printed with the ratios to the compact models."""
        medians = {name: statistics.median(times) / tokens for name, times in seconds.items()}
        parts = [f"{name} {1 / time:.1f} {unit}" for name, time in medians.items()]
        for ours in {"compact", "int8"} & seconds.keys():
            for name in seconds.keys() - {"compact", "int8"}:
                ratios = sorted(one / other for one, other in zip(seconds[name], seconds[ours]))
                parts.append(f"{name}/{ours} {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print(f"  {what}: " + ", ".join(parts), flush=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(self.about | {"what": what, "load": os.getloadavg()[0], "seconds": medians}) + "\n")


@torch.no_grad()
def measure(given: argparse.Namespace, name: str, sparsity: str, names: list[str]) -> None:
    """`WORK/model` holds the pruned model, `WORK/compact` and `WORK/int8` its compact forms."""
    work, long = given.work, torch.randint(5, 2000, (1, PREFILL))
    for kind, folder in (("torch bf16", "model"), ("compact", "compact"), ("int8", "int8")):
        if kind in names and given.memory:
            about = resident(kind, work / folder)
            print(
                f"  {kind}: files {bytes_of(work / folder) / 2**20:.0f} MiB, resident {about['mib']:.0f} MiB, ", end=""
            )
            print(f"load and first token {about['load']:.2f} s", flush=True)
    models = {kind: MODELS[kind](work) for kind in names}
    if given.compiled:
        name = f"{name}, compiled"
        for model in models.values():
            if isinstance(model, nn.Module):
                compile_decoding(model)
    for threads in given.threads:
        torch.set_num_threads(threads)
        table = Table(work, {"model": name, "sparsity": sparsity, "threads": threads, "clock": given.clock})
        for batch in given.batch:
            able = {kind: model for kind, model in models.items() if batch == 1 or isinstance(model, nn.Module)}
            calls = {kind: generation(model, batch, given.tokens) for kind, model in able.items()}
            seconds = alternately(calls, given.repeats, CLOCKS[given.clock])
            table.add(f"{threads} threads, batch {batch}", "tokens/s", seconds, batch * given.tokens)
        if given.prefill:
            calls = {kind: lambda m=model: m(input_ids=long, logits_to_keep=1) for kind, model in models.items()}
            table.add(
                f"{threads} threads, prefill",
                "tokens/s",
                alternately(calls, given.repeats, CLOCKS[given.clock]),
                PREFILL,
            )
    gc.collect()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", nargs="*", default=[], choices=SHAPES)
    arguments.add_argument("--model", type=Path, help="a model folder")
    arguments.add_argument("--masks", type=Path, help="its mask file, if it is pruned")
    arguments.add_argument("--sparsity", nargs="+", default=["0", "0.3", "0.5", "0.7", "0.9", "2of4"])
    arguments.add_argument("--only", nargs="+", default=list(MODELS), choices=MODELS)
    arguments.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    arguments.add_argument("--batch", nargs="+", type=int, default=[1])
    arguments.add_argument("--tokens", type=int, default=200)
    arguments.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of one thread, on a busy machine")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--prefill", action="store_true", help=f"of {PREFILL} tokens too")
    arguments.add_argument("--compiled", action="store_true", help="decoding steps by torch.compile, in all models")
    arguments.add_argument("--memory", action="store_true", help="sizes, load time and resident memory too")
    arguments.add_argument("--work", type=Path, required=True, help="a folder for rows, plot, and models for a while")
    given = arguments.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.clock == "cpu" and given.threads != [1]:
        arguments.error("--clock cpu counts the time of all threads: set --threads 1")
    print(f"{kernels.best()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    for source in [given.model] if given.model else given.shape:
        for sparsity in ["masks"] if given.masks else given.sparsity:
            for folder in ("model", "compact", "int8"):
                shutil.rmtree(given.work / folder, ignore_errors=True)
            if given.masks:
                masks = Masks.load(given.masks)
                shutil.copytree(source, given.work / "model")
                sparsity = ", ".join(sorted(set(masks.patterns.values())))
            else:
                model = loading.load(source, Recipe()) if given.model else build(source)
                masks = prune_by_magnitude(model, sparsity)
                model.save_pretrained(given.work / "model")
                del model
            print(f"{source}, {sparsity}:")
            for folder, values in (("compact", "exact"), ("int8", "int8")):
                if folder in given.only:
                    before, after = export(given.work / "model", masks, given.work / folder, values=values)
                    print(f"  {folder}: the pruned matrices take {after / before:.4f} of their bytes", flush=True)
            measure(given, Path(source).name, sparsity, [name for name in MODELS if name in given.only])
    for folder in ("model", "compact", "int8"):
        shutil.rmtree(given.work / folder, ignore_errors=True)
    plot(given.work, list(MODELS))
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
