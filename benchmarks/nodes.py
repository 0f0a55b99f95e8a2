"""Simulates two machines by two launches on this one. Masks and numbers must equal those of one process. When one machine is
cut off, the other must end with a message, and the same command must resume.

    python benchmarks/nodes.py --work DIR
"""

import argparse
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chaos import SHORT
from tests.conftest import environment, espalier


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    espalier(*SHORT, "stages=[pretrain]", f"run_dir={work}/dense/run")
    settings = (*SHORT, "stages=[prune,finetune,evaluate,report]", f"model={work}/dense/run/pretrain/model")
    alone = work / "alone" / "run"
    espalier(*settings, f"run_dir={alone}")
    for launcher, each in (("accelerate", 1), ("accelerate", 2), ("torchrun", 1), ("torchrun", 2)):
        run_dir = work / f"{launcher}{each}" / "run"
        finish(run_dir, launcher, each, settings)
        print(f"{launcher}, 2 x {each} processes: {compare(run_dir, alone)}", flush=True)
    for launcher, each, number, node in (
        ("accelerate", 1, signal.SIGKILL, 1),
        ("accelerate", 2, signal.SIGKILL, 0),
        ("torchrun", 1, signal.SIGSTOP, 1),
        ("torchrun", 2, signal.SIGSTOP, 0),
    ):
        run_dir = work / f"{number.name}{node}" / "run"
        seconds, message = cut_off(run_dir, launcher, each, settings, number, node)
        print(f"{number.name} of node {node}, {launcher}, 2 x {each}: the other ended after {seconds:.0f} s: {message}")
        finish(run_dir, launcher, each, settings)
        print(f"  and the same command: {compare(run_dir, alone)}", flush=True)
    return 0


def launch(run_dir: Path, launcher: str, each: int, settings: tuple[str, ...]) -> list[subprocess.Popen]:
    """Two launches that connect over loopback, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    running = []
    for node in "01":
        if launcher == "accelerate":
            how = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", str(2 * each)]
            how += ["--machine_rank", node, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        else:
            how = ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", str(each)]
            how += ["--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", port]
        line = [sys.executable, "-m", *how, "launch.py", *settings, f"run_dir={run_dir}"]
        with open(run_dir.parent / f"node{node}.txt", "w") as log:
            running.append(subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=log, stderr=log))
    return running


def finish(run_dir: Path, launcher: str, each: int, settings: tuple[str, ...]) -> None:
    codes = [node.wait() for node in launch(run_dir, launcher, each, settings)]
    assert codes == [0, 0], (codes, run_dir)


def cut_off(
    run_dir: Path, launcher: str, each: int, settings: tuple[str, ...], number: signal.Signals, node: int
) -> tuple[float, str]:
    """Sends a signal to all processes of a node during training; returns the seconds until the other ends, and its message."""
    running = launch(run_dir, launcher, each, settings)
    while not list(run_dir.glob(".finetune/checkpoints/*.ckpt")):
        time.sleep(0.02)
    root = psutil.Process(running[node].pid)
    tree = [root, *root.children(recursive=True)]
    for process in tree:
        os.kill(process.pid, number)
    started = time.monotonic()
    running[1 - node].wait()
    seconds = time.monotonic() - started
    for process in tree:
        if process.is_running():
            process.kill()
    running[node].wait()
    log = (run_dir.parent / f"node{1 - node}.txt").read_text().splitlines()
    return seconds, " | ".join(line for line in log if line.startswith("espalier: "))


def compare(run_dir: Path, alone: Path) -> str:
    mine, theirs = (json.loads((run / "evaluate/results.json").read_text())["models"] for run in (run_dir, alone))
    masks = [(run / "prune/masks.safetensors").read_bytes() for run in (run_dir, alone)]
    # the fine-tuned models differ in their last digits, because sums have another order
    same = {name: mine[name] == theirs[name] for name in ("dense", "pruned")}
    losses = [losses_of(run) for run in (run_dir, alone)]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    tuned = [model["finetuned"]["perplexity"]["world"] for model in (mine, theirs)]
    return (
        f"masks {'equal' if masks[0] == masks[1] else 'DIFFER'}; perplexity and tasks of dense and pruned "
        f"{'equal' if all(same.values()) else f'DIFFER {same}'}; losses at most {apart:.1e} apart; "
        f"fine-tuned perplexity {tuned[0]:.4f} and {tuned[1]:.4f}"
    )


def losses_of(run_dir: Path) -> list[float]:
    with open(run_dir / "finetune/metrics.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    sys.exit(main())
