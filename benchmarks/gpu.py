"""Times the stages on this machine's GPU (or CPU) against their floors, and prints where the time goes.

    python benchmarks/gpu.py --shape 7b --work ./work                      # needs 40 GB of disk and a GPU of 140 GB
    python benchmarks/gpu.py --shape 7b --layers 8 --work ./work           # a quarter of the layers: a quarter of the time
    python benchmarks/gpu.py --shape 170m --samples 2 --seq-len 64 --steps 2 --work ./work        # anywhere

A Llama of random bf16 weights. The floor of a stage is the larger of its floating-point operations at the rate that a large
product reaches here, and the bytes that it moves between host and device at the rate of a large copy; that of a decoded token,
the bytes of the weights at the rate of the device's memory. Attention, reading files and starting the process are not in the
floor. `--profile` runs the prune stage once more, with an eighth of the text, in this process, under torch's profiler.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.memory import write_model
from benchmarks.prune import SHAPES, wait
from pipeline.runtime import hardware, processes
from pipeline.settings import reader
from pipeline.stages import runner

VOCABULARY = 32000
PARTS = ("wanda", "sparsegpt", "lora", "qlora", "full", "evaluate", "compact")


def rates() -> tuple[float, float, float]:
    """Floating-point operations per second of a bf16 product, bytes per second from host to device, and bytes per second of the
    device's memory, read and written; the best of five."""
    device = processes.device()
    side, size = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(there)
    return (
        2 * side**3 / best(lambda: a @ a),
        size / best(lambda: there.copy_(host)),
        2 * size / best(lambda: copy.copy_(there)),
    )


def best(work: Callable[[], object]) -> float:
    """Seconds."""
    seconds = []
    for _ in range(6):
        wait()
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


class Floors:
    """Seconds that each stage takes at least."""

    def __init__(self, shape: str, tokens: int, step_tokens: int) -> None:
        self.operations, self.bytes, self.memory = rates()
        hidden, inner = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
        layers = SHAPES[shape]["num_hidden_layers"]
        self.matrices = layers * (4 * hidden**2 + 3 * hidden * inner)
        self.head = VOCABULARY * hidden
        # X^T X by halves, for the inputs of q/k/v, o, gate/up and down; the column loop: as many products as a row has weights
        self.hessians = layers * tokens * (3 * hidden**2 + inner**2)
        self.columns = layers * (4 * hidden**3 + 2 * inner * hidden**2 + hidden * inner**2)
        self.tokens, self.step_tokens = tokens, step_tokens

    def seconds(self, stage: str) -> float:
        forward = 2 * self.matrices
        moved = 4 * self.matrices  # bf16 weights to the device and back
        operations = {
            "wanda": 2 * forward * self.tokens,
            "sparsegpt": 2 * forward * self.tokens + self.hessians + self.columns,
            "lora": 2 * (forward + 2 * self.head) * self.step_tokens,
            "full": 3 * (forward + 2 * self.head) * self.step_tokens,
            "evaluate": (forward + 2 * self.head) * self.tokens,
        }[stage]
        prunes = stage in ("wanda", "sparsegpt")
        return max(operations / self.operations, moved / self.bytes if prunes else 0.0)


def decoding(run_dir: Path, shape: str, floors: Floors) -> list[tuple[str, float, float]]:
    """(name, seconds, floor) of a token at batch 1 from each model; a token reads one row of the embeddings."""
    models = json.loads((run_dir / "speed/results.json").read_text())["models"]
    embeddings = 2 * VOCABULARY * SHAPES[shape]["hidden_size"]
    return [
        (
            f"{'dense' if name == 'ordinary' else name}, a token",
            1 / model["decode"]["1"]["median"],
            (model["file_bytes"] - embeddings) / floors.memory,
        )
        for name, model in models.items()
    ]


def launch(*settings: object) -> None:
    subprocess.run([sys.executable, "launch.py", *map(str, settings)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def stage_seconds(run_dir: Path, stage: str) -> float:
    return json.loads((run_dir / stage / "stage.json").read_text())["seconds"]


def step_seconds(run_dir: Path, step_tokens: int) -> float:
    """The median of the steps after the first."""
    with open(run_dir / "finetune" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return statistics.median(step_tokens / float(row["tokens_per_second"]) for row in rows[1:] or rows)


def print_profile(settings: list[str]) -> None:
    """The operations with the most time of their own, and the share of the time in which the device computes nothing."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    started = time.perf_counter()
    with profile(activities=activities) as profiled:
        runner.run(reader.load(settings))
    seconds = time.perf_counter() - started
    events = profiled.key_averages()
    if on_gpu:
        busy = sum(event.self_device_time_total for event in events) / 1e6
        print(f"\nthe device is idle for {1 - busy / seconds:.0%} of {seconds:.1f} s")
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    for event in sorted(events, key=lambda event: -getattr(event, kind))[:12]:
        print(f"{getattr(event, kind) / 1e6:9.2f} s  {event.count:8} calls  {event.key}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10, help="of fine-tuning")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    work = args.work.resolve()
    if args.layers:
        SHAPES[args.shape]["num_hidden_layers"] = args.layers
    write_model(work / "model", args.shape)
    ids = torch.randint(0, VOCABULARY, (args.samples, args.seq_len), generator=torch.Generator().manual_seed(0))
    Dataset.from_dict({"input_ids": ids.tolist()}).to_parquet(work / "ids.parquet")
    model, text = work / "model", work / "ids.parquet"
    floors = Floors(args.shape, args.samples * args.seq_len, args.seq_len)
    print(f"{hardware.machine()}, torch {torch.__version__}: {floors.operations / 1e12:.1f} TFLOP/s in bf16, ", end="")
    print(f"{floors.bytes / 1e9:.1f} GB/s to the device, {floors.memory / 1e9:.0f} GB/s in its memory\n")
    print("| part | seconds | floor | times |\n| --- | --- | --- | --- |")
    calibration = (
        f"calibration.dataset={text}",
        f"calibration.samples={args.samples}",
        f"calibration.seq_len={args.seq_len}",
    )
    common = (f"model={model}", *calibration)
    tuning = (f"finetune.dataset={text}", f"finetune.seq_len={args.seq_len}", "finetune.batch_size=1")
    tuning += (f"finetune.max_steps={args.steps}", "finetune.checkpoint_activations=true")
    own = {
        "lora": ("finetune.method=lora",),
        "qlora": ("finetune.method=lora", "finetune.quantize=nf4"),
        "full": ("finetune.method=full",),
    }
    try:
        for part in args.parts:
            run_dir = work / part / "run"
            pruned = work / "wanda/run/prune"
            if part in (*own, "compact") and pruned.is_dir():
                shutil.copytree(pruned, run_dir / "prune", copy_function=os.link)
            if part in own:
                launch(*common, *tuning, *own[part], "stages=[prune,finetune]", f"run_dir={run_dir}")
                floor = floors.seconds("full" if part == "full" else "lora")
                rows = [(f"{part}, a step", step_seconds(run_dir, args.seq_len), floor)]
            elif part == "evaluate":
                measured = (f"evaluate.perplexity=[{text}]", f"evaluate.seq_len={args.seq_len}", "evaluate.tasks=[]")
                launch(*common, *measured, "evaluate.continuations=0", "stages=[evaluate]", f"run_dir={run_dir}")
                rows = [(part, stage_seconds(run_dir, "evaluate"), floors.seconds("evaluate"))]
            elif part == "compact":
                measured = ("speed.batches=[1]", "speed.prompt_lengths=[]", "speed.repeats=3")
                launch(*common, *measured, "stages=[prune,export,speed]", f"run_dir={run_dir}")
                rows = decoding(run_dir, args.shape, floors)
            else:
                launch(*common, f"prune.method={part}", "stages=[prune]", f"run_dir={run_dir}")
                rows = [(part, stage_seconds(run_dir, "prune"), floors.seconds(part))]
            for name, seconds, floor in rows:
                print(f"| {name} | {seconds:.3g} | {floor:.2g} | {seconds / floor:.1f} |", flush=True)
            if part != "wanda":  # whose pruned model the later parts use
                shutil.rmtree(run_dir)
        if args.profile:
            few = f"calibration.samples={max(1, args.samples // 8)}"  # the profiler keeps every operation
            print_profile([*common, few, "stages=[prune]", f"run_dir={work}/profile/run"])
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
