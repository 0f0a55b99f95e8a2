"""Kills a run, all its processes at once and for good (-9), at random moments in each of its stages, and types the same
command again: masks, weights and results must be, to the bit, those of a run that nobody killed.

    python benchmarks/chaos.py --kills 15 --processes 1 2 --work DIR
"""

import argparse
import contextlib
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.recipe import STAGES
from tests.conftest import command, environment

SHORT = (
    "recipe=tiny",
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
        assert start(whole, processes, SHORT).wait() == 0
        landed = []
        for series in range(-(-arguments.kills // len(STAGES))):
            run_dir = folder / str(series) / "run"
            left = min(len(STAGES), arguments.kills - len(landed))
            landed += [kill_in(stage, draw, run_dir, whole, processes, SHORT) for stage in STAGES[:left]]
            code = start(run_dir, processes, SHORT).wait()
            same = code == 0 and what_matters(run_dir) == what_matters(whole)
            differ += not same
            print(
                f"{processes} processes, run {series}: {'the same' if same else f'DIFFERS (exit {code})'}", flush=True
            )
        print(f"{processes} processes: {len(landed)} kills, in " + ", ".join(landed), flush=True)
    return differ


def start(run_dir: Path, processes: int, settings: tuple[str, ...]) -> subprocess.Popen:
    """The command as a user types it. Measurements are kept beside a run, so each run has a folder around it."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    line = command(*settings, f"run_dir={run_dir}", processes=processes)
    with open(run_dir.parent / "log.txt", "a") as log:
        return subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=log, stderr=log)


def kill_in(stage: str, draw: random.Random, run_dir: Path, whole: Path, processes: int, settings: tuple) -> str:
    """Kills a run at a random moment of a stage, from its start to a little after its end; says what it was doing then."""
    running = start(run_dir, processes, settings)
    while not any((run_dir / name).exists() for name in (f".{stage}", stage)) and running.poll() is None:
        time.sleep(0.002)
    seconds = json.loads((whole / stage / "stage.json").read_text())["seconds"]
    time.sleep(draw.uniform(0, 1.1 * seconds))
    kill_all(running)
    now = [path.name[1:] for path in run_dir.glob(".*") if path.is_dir()]
    return now[0] if now else f"after {stage}"


def kill_all(running: subprocess.Popen) -> None:
    """The launcher, and the processes that it started in sessions of their own."""
    if running.poll() is None:
        launcher = psutil.Process(running.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    running.wait()


def what_matters(run_dir: Path) -> dict[str, str]:
    """Hashes of masks, weights and results, by their path."""
    paths = [*run_dir.rglob("*.safetensors"), run_dir / "evaluate/results.json"]
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


if __name__ == "__main__":
    sys.exit(main())
