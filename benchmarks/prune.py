"""Times the prune stage against the textbook implementation, alternating in one run.

    python benchmarks/prune.py                       # a Llama of about 170M parameters, 32 x 512 tokens
    python benchmarks/prune.py --methods wanda --dtypes float32 --repeats 5
    python benchmarks/prune.py --shape 7b --samples 128 --seq-len 2048 --only-ours   # on a GPU

Prints medians and ratios (textbook / ours). The textbook implementation is `tests/textbook.py`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from callbacks.layer_writer import LayerWriter
from pipeline.engine.matrices import matrices_of
from pipeline.engine.walk import LayerWalk, run_layerwise
from pipeline.pruning.allocation import allocate
from pipeline.pruning.block_pruner import BlockPruner
from pipeline.registry import PRUNE_METHODS
from pipeline.runtime import processes
from pipeline.settings.schema import Prune
from pipeline.sparsity import patterns
from pipeline.sparsity.patterns import Pattern
from tests import textbook

SHAPES = {
    "170m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "num_attention_heads": 16},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def build(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, tie_word_embeddings=True, use_cache=False, **SHAPES[shape])
    with torch.device(processes.device()):
        return LlamaForCausalLM(config).to(dtype).eval()


class Clock:
    """Sums the seconds spent in the functions that `around` wraps."""

    def __init__(self) -> None:
        self.total = 0.0

    def around(self, function):
        def timed(*args, **kwargs):
            wait()
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                wait()
                self.total += time.perf_counter() - started

        return timed


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(model, windows, method: str, pattern: str, batch_size: int) -> dict[str, float]:
    settings = Prune(method=method, sparsity=pattern)
    observing, passing, ending = Clock(), Clock(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        walk = LayerWalk(model, list(windows.split(batch_size)), processes.device(), Path(folder))
        chosen = PRUNE_METHODS.entry(method).load()(settings, allocate(walk.blocks, settings))
        chosen.observe = observing.around(chosen.observe)
        walk.forwards.run_block = passing.around(walk.forwards.run_block)
        writer = LayerWriter()
        writing = Clock()
        writer.write_on_batch_end = writing.around(writer.write_on_batch_end)
        writer.on_predict_end = writing.around(writer.on_predict_end)  # waits for the last block
        wait()
        started = time.perf_counter()
        run_layerwise(walk, ending.around(BlockPruner(chosen)), [writer])
        wait()
        seconds = time.perf_counter() - started - writing.total  # the textbook implementation writes no files
    # without the forward passes, but with the observers that run in them
    pruning = ending.total - passing.total + observing.total
    return {"stage": seconds, "pruning": pruning, "writing": writing.total}


def plain(model, windows, method: str, pattern: str) -> dict[str, float]:
    model.to(processes.device())
    clock = Clock()
    patched = {"to_prune": textbook.to_prune, "surgeon": textbook.surgeon}
    hook = textbook.Statistics.hook
    textbook.Statistics.hook = lambda self: clock.around(hook(self))
    outer = "to_prune" if method in textbook.SCORES else "surgeon"
    setattr(textbook, outer, clock.around(patched[outer]))
    try:
        wait()
        started = time.perf_counter()
        textbook.prune(model, windows, method, patterns.parse(pattern))
        wait()
    finally:
        setattr(textbook, outer, patched[outer])
        textbook.Statistics.hook = hook
    return {"stage": time.perf_counter() - started, "pruning": clock.total}


def selecting(shape: str, pattern: Pattern, repeats: int) -> tuple[float, float]:
    """Median seconds to select one layer's masks: (textbook, ours)."""
    model = build(shape, torch.float32) if shape == "170m" else None
    weights = [matrix.weight_OI for name, matrix in matrices_of(model).items() if ".layers.0." in name]
    scores = [weight.abs() * torch.rand(1, weight.shape[1], device=weight.device) for weight in weights]
    norm = torch.ones(1)
    ways = [
        lambda: [textbook.to_prune("wanda", score, norm, pattern) for score in scores],
        lambda: [pattern.select(score) for score in scores],
    ]
    assert all(torch.equal(~pruned, kept) for pruned, kept in zip(ways[0](), ways[1]()))
    times = [[], []]
    for _ in range(repeats):
        for way, seconds in zip(ways, times):
            wait()
            started = time.perf_counter()
            way()
            wait()
            seconds.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="170m")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=["wanda", "magnitude", "sparsegpt"])
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2of4"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only-ours", action="store_true")
    args = parser.parse_args()
    processes.start()
    processes.say = lambda text: None
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}; torch {torch.__version__}; {args.shape}, {args.samples} x {args.seq_len} tokens; medians of {args.repeats}"
    )
    if args.shape == "170m":
        print("\nselecting the masks of a layer    textbook ms   ours ms   ratio")
        for pattern in map(patterns.parse, args.patterns):
            old, new = selecting(args.shape, pattern, 4 * args.repeats + 1)
            print(f"{pattern!s:32}{1e3 * old:13.1f}{1e3 * new:10.1f}{old / new:8.1f}")
    print("\n" + "method     pattern dtype     stage s: textbook   ours  ratio", end="   ")
    print("pruning s: textbook   ours  ratio   share of ours  writing")
    for method in args.methods:
        for pattern in args.patterns:
            for dtype in args.dtypes:
                compare(args, method, pattern, dtype)


def compare(args, method: str, pattern: str, dtype: str) -> None:
    windows = torch.randint(0, 32000, (args.samples, args.seq_len), generator=torch.Generator().manual_seed(0))
    windows = windows.to(processes.device())
    new, old = [], []
    # a first call warms up: it chooses the kernels
    ours(build(args.shape, getattr(torch, dtype)), windows[:1], method, pattern, 1)
    for _ in range(args.repeats):
        new.append(ours(build(args.shape, getattr(torch, dtype)), windows, method, pattern, args.batch_size))
        if not args.only_ours:
            old.append(plain(build(args.shape, getattr(torch, dtype)), windows, method, pattern))
    mine = {key: statistics.median(run[key] for run in new) for key in new[0]}
    theirs = {key: statistics.median(run[key] for run in old) for key in old[0]} if old else {}
    stage, pruning = theirs.get("stage", float("nan")), theirs.get("pruning", float("nan"))
    print(
        f"{method:11}{pattern:8}{dtype:10}{stage:17.2f}{mine['stage']:7.2f}{stage / mine['stage']:7.2f}"
        f"{pruning:22.2f}{mine['pruning']:7.2f}{pruning / mine['pruning']:7.2f}"
        f"{100 * mine['pruning'] / mine['stage']:14.1f} %{mine['writing']:8.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
