"""Times fine-tuning steps of the masked LoRA, cached and recomputed, and of peft's plain LoRA, alternating in one run.

    python benchmarks/finetune.py                        # a Llama of about 170M parameters; 512, 2048 and 8192 tokens
    python benchmarks/finetune.py --shape 7b --dtype bfloat16 --tokens 8192 --seq-len 2048      # on a GPU

A step is forward, backward, AdamW, and for the cached form the update of the masked weights. Prints medians, ratios to plain
LoRA, and the peak memory of each way: allocated on a GPU, or on a CPU the kernel's peak of a separate process, which includes
0.4 GiB of libraries (sampling would miss the short peaks of a backward pass). There each tensor is mapped separately, because
holes in the heap, of up to a GiB, would vary from run to run.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.prune import SHAPES, build, wait
from pipeline.engine.matrices import matrices_of
from pipeline.recovery import lora
from pipeline.runtime import processes
from pipeline.runtime.memory import GIB
from pipeline.settings.schema import Finetune
from pipeline.sparsity.masks import Masks, apply_
from pipeline.sparsity.patterns import NofM

WAYS = ("plain LoRA", "masked, cached", "masked, recomputed")


class Training:
    """A model, its optimizer, and `step()`."""

    def __init__(self, way: str, args: argparse.Namespace) -> None:
        model, masks = build(args.shape, getattr(torch, args.dtype)), Masks()
        for name, matrix in matrices_of(model).items():
            mask_OI = NofM(2, 4).select(matrix.weight_OI.float().abs())
            apply_(matrix.weight_OI, mask_OI)
            masks.add(name, mask_OI, "2of4")
        settings = Finetune(rank=args.rank, alpha=2.0 * args.rank)
        if way == WAYS[0]:
            self.model = get_peft_model(model, lora.lora_config(model, masks, settings))
        else:
            self.model = lora.attach(model, masks, settings, cached=way == WAYS[1])
        self.masked = way != WAYS[0]
        if args.checkpoint_activations:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-4)

    def step(self, ids: torch.Tensor) -> float:
        wait()
        started = time.perf_counter()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masked:
            assert lora.refresh_all(self.model) == 0
        wait()
        return time.perf_counter() - started


def batch(tokens: int, args: argparse.Namespace) -> torch.Tensor:
    length = min(args.seq_len, tokens)
    ids = torch.randint(0, 32000, (tokens // length, length), generator=torch.Generator().manual_seed(0))
    return ids.to(processes.device())


def peak_gib(way: str, tokens: int, args: argparse.Namespace) -> float:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        training = Training(way, args)
        for _ in range(3):
            training.step(batch(tokens, args))
        return torch.cuda.max_memory_allocated() / GIB
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", way, "--tokens", str(tokens)]
    _, status, usage = os.wait4(
        os.spawnve(os.P_NOWAIT, command[0], command, os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}), 0
    )
    assert status == 0, f"{way} failed"
    return usage.ru_maxrss / 2**20  # KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="170m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="of a step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one way, for its memory
    args = parser.parse_args()
    processes.start()
    if args.alone:
        training = Training(args.alone, args)
        for _ in range(2):
            training.step(batch(args.tokens[0], args))
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; {args.shape}, {args.dtype}, rank {args.rank}; medians of {args.repeats}")
    print(f"\n{'tokens a step':14}{'way':20}{'seconds':>9}{'ratio':>7}{'peak GiB':>10}{'ratio':>7}")
    for tokens in args.tokens:
        peaks = {way: peak_gib(way, tokens, args) for way in args.ways}
        running = {way: Training(way, args) for way in args.ways}
        ids = batch(tokens, args)
        times = {way: [training.step(ids) for training in [running[way]]] for way in args.ways}  # a first step warms up
        for _ in range(args.repeats):
            for way, training in running.items():
                times[way].append(training.step(ids))
        plain, least = statistics.median(times[args.ways[0]][1:]), peaks[args.ways[0]]
        for way in args.ways:
            seconds = statistics.median(times[way][1:])
            print(
                f"{tokens:<14}{way:20}{seconds:9.3f}{seconds / plain:7.2f}{peaks[way]:10.2f}{peaks[way] / least:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
