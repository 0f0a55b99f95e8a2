"""Kills a run (kill -9 of all its processes) at random times in each of its stages, and starts it again: masks, weights and
results must equal those of an uninterrupted run bit for bit.

    python benchmarks/chaos.py --kills 15 --processes 1 2 --work DIR

The runs are forked from this process, which saves the seconds of imports.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.settings.schema import STAGES
from tests.launches import end, fork

SHORT = (
    "recipe=tiny",
    f"stages=[{','.join(STAGES)}]",
    "reconstruct.epochs=2",
    "pretrain.steps=300",
    "finetune.max_steps=40",
    "finetune.checkpoint_every=10",
    "evaluate.limit=25",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=15, help="for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    draw, differ = random.Random(arguments.seed), 0
    for processes in arguments.processes:
        folder = arguments.work / str(processes)
        whole = folder / "whole" / "run"
        assert end(start(whole, processes)) == [0] * processes
        kills = []
        for series in range(-(-arguments.kills // len(STAGES))):
            run_dir = folder / str(series) / "run"
            remaining = min(len(STAGES), arguments.kills - len(kills))
            kills += [kill_in(stage, draw, run_dir, whole, processes) for stage in list(STAGES)[:remaining]]
            codes = end(start(run_dir, processes))
            same = codes == [0] * processes and hashes(run_dir) == hashes(whole)
            differ += not same
            print(
                f"{processes} processes, run {series}: {'the same' if same else f'DIFFERS (exit {codes})'}", flush=True
            )
        print(f"{processes} processes: {len(kills)} kills, in " + ", ".join(kills), flush=True)
    return differ


def start(run_dir: Path, processes: int) -> list[BaseProcess]:
    """Measurements are cached next to a run, so each run has its own parent folder."""
    return fork((*SHORT, f"run_dir={run_dir}"), run_dir.parent / "log", processes)


def kill_in(stage: str, draw: random.Random, run_dir: Path, whole: Path, processes: int) -> str:
    """Kills a run at a random time between the start of a stage and shortly after its end; returns what it was doing."""
    running = start(run_dir, processes)
    while not any((run_dir / name).exists() for name in (f".{stage}", stage)) and running[0].is_alive():
        time.sleep(0.002)
    seconds = json.loads((whole / stage / "stage.json").read_text())["seconds"]
    time.sleep(draw.uniform(0, 1.1 * seconds))
    for process in running:
        process.kill()
    end(running)
    now = [path.name[1:] for path in run_dir.glob(".*") if path.is_dir()]
    return now[0] if now else f"after {stage}"


def hashes(run_dir: Path) -> dict[str, str]:
    """Hashes of masks, weights and results, by their path."""
    paths = [*run_dir.rglob("*.safetensors"), run_dir / "evaluate/results.json"]
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


if __name__ == "__main__":
    sys.exit(main())
