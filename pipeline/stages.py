"""Owns a run's state: which stages there are, what each reads, when one is done, and where it works.

A stage is done when `<run_dir>/<stage>/stage.json` holds the key of what it was made from. It works in
`<run_dir>/.<stage>/`, which is renamed when it is whole: resuming is the same command again.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import (
    evaluate,
    files,
    finetune,
    hardware,
    memory,
    models,
    pretrain,
    processes,
    prune,
    reconstruct,
    report,
    siblings,
    sources,
)
from pipeline.recipe import Recipe, plain, section

LIBRARIES = ("torch", "transformers", "datasets", "lightning", "peft", "accelerate", "lm_eval")


@dataclass(frozen=True)
class Stage:
    """`run(recipe, folder, inputs)` writes `folder`; `settings` are the recipe's keys that decide what it writes."""

    name: str
    run: Callable[[Recipe, Path, dict[str, Path]], None]
    reads: tuple[str, ...]
    settings: tuple[str, ...]


MODEL = ("dtype", "attn_implementation", "trust_remote_code")
STAGES = (
    Stage("pretrain", pretrain.run, (), ("pretrain", "seed")),
    Stage("prune", prune.run, ("pretrain",), (*MODEL, "calibration", "prune", "seed")),
    Stage("reconstruct", reconstruct.run, ("pretrain", "prune"), (*MODEL, "calibration", "reconstruct", "seed")),
    Stage("finetune", finetune.run, ("pretrain", "prune", "reconstruct"), (*MODEL, "finetune", "seed")),
    Stage("evaluate", evaluate.run, ("pretrain", "prune", "reconstruct", "finetune"), (*MODEL, "evaluate", "seed")),
    Stage("report", report.run, ("pretrain", "prune", "reconstruct", "finetune", "evaluate"), ("model", "stages")),
)


def run(recipe: Recipe) -> None:
    """Runs what is not done yet, and shows the results."""
    processes.start()
    try:
        run_dir = Path(recipe.run_dir)
        chosen = [stage for stage in STAGES if stage.name in recipe.stages]
        outside = processes.from_main(_read_from_outside(recipe) if processes.is_main() else None)
        reconstruct.check(recipe)
        evaluate.check(recipe)
        done: dict[str, str] = {}  # stage -> key
        for stage in chosen:
            inputs = {name: run_dir / name for name in stage.reads if name in done}
            made_from = {name: section(recipe, name) for name in stage.settings}
            made_from |= {"read": {name: done[name] for name in inputs}, **outside.get(stage.name, {})}
            done[stage.name] = files.digest(made_from)
            _run_one(stage, recipe, run_dir, inputs, made_from, done[stage.name])
        if processes.is_main() and "report" in done:
            report.show(run_dir)
    finally:
        processes.stop()


def _run_one(stage: Stage, recipe: Recipe, run_dir: Path, inputs: dict[str, Path], made_from: dict, key: str) -> None:
    finished, work = run_dir / stage.name, run_dir / f".{stage.name}"
    before = _read(finished)
    state = processes.from_main((before or {}).get("key") == key)
    if state:
        processes.say(f"{stage.name}: done before")
        return
    if processes.from_main(processes.is_main() and _is_taken_over(stage, finished, key)):
        return
    if processes.is_main():
        if before:
            print(f"{stage.name}: {_difference(before['made_from'], made_from)}: running again", flush=True)
        else:
            print(f"{stage.name}: running", flush=True)
        if (_read(work) or {}).get("key") != key:
            shutil.rmtree(work, ignore_errors=True)
        files.write_json(work / "stage.json", {"key": key, "stage": stage.name})
    processes.barrier()
    memory.restart_peak(processes.device())
    started = time.perf_counter()
    stage.run(recipe, work, inputs)
    memory_gib = max(processes.all_ranks(memory.peak_gib(processes.device())))
    if processes.is_main():
        about = {
            "key": key,
            "stage": stage.name,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 1),
            "processes": processes.world_size(),
            "memory_gib": round(memory_gib, 3),  # of the process that used most
            "machine": hardware.machine(),
            "system": hardware.system(),
            "versions": {library: version(library) for library in LIBRARIES},
            "made_from": made_from,
            "recipe": plain(recipe),
        }
        files.write_json(work / "stage.json", about)
        old = run_dir / f".{stage.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if finished.exists():
            finished.rename(old)
        work.rename(finished)
        shutil.rmtree(old, ignore_errors=True)
        print(f"{stage.name}: done in {about['seconds']:.0f} s", flush=True)
    processes.barrier()


def _is_taken_over(stage: Stage, finished: Path, key: str) -> bool:
    """Whether another cell of this sweep has made the same; not the report, which also tells where its run lies.

    A run on its own takes over nothing: whoever repeats one wants to see it come out again.
    """
    if processes.CELL not in os.environ or stage.name == "report":
        return False
    sibling = siblings.take_over(finished, key)
    if sibling:
        print(f"{stage.name}: taken over from {sibling}", flush=True)
    return sibling is not None


def _read_from_outside(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What the stages read from outside, so that a changed model or text is seen, and a missing one before any work."""
    found: dict[str, dict[str, Any]] = {}
    if recipe.model is not None:
        identity = models.identity(models.locate(recipe.model, recipe.revision))
        found |= {"prune": {"model": identity}, "evaluate": {"model": identity}}
    for name in ("prune", "reconstruct", "finetune", "evaluate"):
        if name in recipe.stages:
            texts = {str(source): sources.identity(source) for source in sources.of_stage(recipe, name)}
            found[name] = found.get(name, {}) | {"data": texts}
    return found


def _read(folder: Path) -> dict | None:
    return files.read_json(folder / "stage.json")


def _difference(before: dict, now: dict, prefix: str = "") -> str:
    """The first setting that differs, as `finetune.lr 0.1 -> 0.2`."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if old != new:
                return _difference(old, new, f"{prefix}{key}.")
        elif old != new:
            return f"{prefix}{key} {old} -> {new}"
    return "unfinished"
