"""Prunes a Llama of random bf16 weights from sharded files on disk and prints the peak of its private memory.

    python benchmarks/memory.py --shape 7b --samples 4 --seq-len 128 --work /tmp/espalier-memory

With `--evaluate whole stream` it measures the perplexity instead, with each `evaluate.placement`. Needs up to twice the
model's size on disk (7b: 27 GB), which it removes afterwards. Private memory is RssAnon: pages of the model files are shared
with the other ranks of the node, and the kernel can drop them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.prune import SHAPES
from pipeline.data import world
from pipeline.models import model_files
from pipeline.runtime import processes


def write_model(folder: Path, shape: str) -> int:
    """Writes the model shard by shard, so that it is never completely in memory; returns its size in bytes."""
    folder.mkdir(parents=True)
    config = LlamaConfig(vocab_size=32000, tie_word_embeddings=False, dtype="bfloat16", **SHAPES[shape])
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    world.tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    shards: dict[str, list[str]] = {}
    for name in state:
        key = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(key, []).append(name)
    torch.manual_seed(0)
    device = processes.device()
    for number, names in enumerate(shards.values(), 1):
        # on a GPU in a hundredth of the time
        tensors = {name: torch.randn(state[name].shape, dtype=torch.bfloat16, device=device) * 0.02 for name in names}
        for name in names:
            if "norm" in name:
                tensors[name].fill_(1.0)
        save_file(tensors, folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors", {"format": "pt"})
    model_files.write_index(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak_private_gib(command: list[str]) -> tuple[float, float]:
    """(GiB, seconds) of a command, sampled every 20 ms."""
    started = time.perf_counter()
    running = subprocess.Popen(command, cwd=ROOT)
    status, peak = Path(f"/proc/{running.pid}/status"), 0
    while running.poll() is None:
        for line in status.read_text().splitlines() if status.exists() else ():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]))
        time.sleep(0.02)
    if running.returncode:
        sys.exit(running.returncode)
    return peak / 2**20, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--evaluate", nargs="+", default=[], choices=("whole", "stream", "device_map"))
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    try:
        size = write_model(args.work / "model", args.shape)
        ids = torch.randint(0, 32000, (args.samples, args.seq_len), generator=torch.Generator().manual_seed(0))
        Dataset.from_dict({"input_ids": ids.tolist()}).to_parquet(args.work / "ids.parquet")
        text = f"{args.work}/ids.parquet"
        stages = {
            f"evaluate, {placement}": [
                *("stages=[evaluate]", f"evaluate.placement={placement}", f"evaluate.perplexity=[{text}]"),
                *("evaluate.tasks=[]", "evaluate.continuations=0", f"evaluate.seq_len={args.seq_len}"),
            ]
            for placement in args.evaluate
        } or {
            f"prune, {args.method}": [
                *("stages=[prune]", f"prune.method={args.method}", f"calibration.dataset={text}"),
                *(f"calibration.samples={args.samples}", f"calibration.seq_len={args.seq_len}"),
            ]
        }
        for number, (name, settings) in enumerate(stages.items()):
            run_dir = args.work / str(number) / "run"  # in separate folders, so that no measurement is reused
            command = [sys.executable, "launch.py", f"model={args.work}/model", f"run_dir={run_dir}", *settings]
            peak, seconds = peak_private_gib(command)
            record = json.loads((run_dir / name.split(",")[0] / "stage.json").read_text())
            print(
                f"{args.shape}, {size / 2**30:.1f} GiB of weights, {args.samples} x {args.seq_len} tokens, {name}: "
                f"peak private memory {peak:.2f} GiB, stage {record['seconds']:.0f} s, whole command {seconds:.0f} s, "
                f"machine with {psutil.virtual_memory().total / 2**30:.0f} GiB"
            )
    finally:
        shutil.rmtree(args.work, ignore_errors=True)


if __name__ == "__main__":
    main()
