"""Owns a run's state: when a stage of the table (settings/schema.py) is done, and where it works.

A stage is done when `<run_dir>/<stage>/stage.json` holds the key of what it was made from: its settings, what it reads, the
project's code that decides what it writes. It works in `<run_dir>/.<stage>/`, which is renamed when it is whole: resuming is
the same command again.
"""

import importlib
import os
import shutil
import socket
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import registry
from pipeline.data import sources
from pipeline.evaluation import tasks
from pipeline.models import loading, model_files
from pipeline.reporting.report import show
from pipeline.runtime import checksums, code, files, hardware, lock, memory, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import STAGES, Recipe, Stage, own_code, plain, section
from pipeline.stages import preflight, siblings, space

LIBRARIES = ("torch", "transformers", "datasets", "lightning", "peft", "accelerate", "lm_eval")


OUTCOME = (".safetensors", "results.json")  # what other stages compute with; tables also tell times
SCRATCH = ("masks", "checkpoints")  # what an unfinished stage goes on from
# all of them at once, so that the cells of a sweep, which are forked, import nothing
MODULES = {name: importlib.import_module(f"pipeline.stages.{name}") for name in STAGES}


def run(recipe: Recipe) -> None:
    """Runs what is not done yet, and shows the results."""
    run_dir = Path(recipe.run_dir)
    with processes.together(recipe.timeout_minutes), _traceback_kept(run_dir):
        _refuse_other_settings(recipe)
        outside = check(recipe)
        with _locked(run_dir):
            if processes.is_main():
                preflight.check_disk(recipe)
            done: dict[str, str] = {}  # stage -> what came out of it
            for stage in chosen(recipe):
                inputs = {name: run_dir / name for name in read_by(stage, done)}
                _run_one(stage, recipe, run_dir, inputs, made_from(stage, recipe, done, outside))
                outcome = outcome_of(run_dir / stage.name) if processes.is_main() else None
                done[stage.name] = processes.from_main(outcome)
            if processes.is_main() and "report" in done:
                show(run_dir, stages=done)


def chosen(recipe: Recipe) -> list[Stage]:
    """The stages of the run, in their order."""
    return [stage for stage in STAGES.values() if stage.name in recipe.stages]


def check(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Raises `UserError` for what can be known to fail before any work; returns what each stage reads from outside. All ranks
    must call."""
    outside = processes.from_main(_read_from_outside(recipe) if processes.is_main() else None)
    for stage in chosen(recipe):
        if check := getattr(MODULES[stage.name], "check", None):
            check(recipe)
    preflight.check(recipe)
    return outside


def made_from(stage: Stage, recipe: Recipe, done: dict[str, str], outside: dict) -> dict[str, Any]:
    """What decides what a stage writes; `done`: the outcomes of the stages before it."""
    read = {"read": read_by(stage, done)}
    return {name: section(recipe, name) for name in stage.settings} | read | outside.get(stage.name, {})


def read_by(stage: Stage, done: dict[str, str]) -> dict[str, str]:
    """The outcomes of the stages before it that a stage reads."""
    return {name: done[name] for name in (done if stage.reads is None else stage.reads) if name in done}


def _run_one(stage: Stage, recipe: Recipe, run_dir: Path, inputs: dict[str, Path], made_from: dict) -> None:
    finished, work, key = run_dir / stage.name, run_dir / f".{stage.name}", files.digest(made_from)
    if processes.from_main(processes.is_main() and _is_done(stage, recipe, finished, work, made_from, key)):
        return
    if processes.is_main():
        begun = checksums.read(work)
        if begun is None and (work / checksums.OWN).exists():
            print(f"{stage.name}: {work / checksums.OWN} is damaged: from the start", flush=True)
        if (begun or {}).get("key") != key:
            shutil.rmtree(work, ignore_errors=True)
            checksums.write(work, {"key": key, "stage": stage.name})
        for left in work.rglob(".*.part"):
            if left.is_file():  # not the folder of a half export, which that stage removes itself
                left.unlink()
        space.check(stage.name, recipe, inputs, work)
    processes.barrier()
    memory.free_memory()
    memory.restart_peak(processes.device())
    started, computed = time.perf_counter(), time.process_time()
    MODULES[stage.name].run(recipe, work, inputs)
    cpu_seconds = sum(processes.all_ranks(time.process_time() - computed))
    memory_gib = max(processes.all_ranks(memory.peak_gib(processes.device())))
    if processes.is_main():
        files.apply_umask(work)
        about = {
            "key": key,
            "stage": stage.name,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(cpu_seconds, 1),  # of all processes: what tells on a busy machine
            "processes": processes.world_size(),
            "memory_gib": round(memory_gib, 3),  # of the process that used most
            "machine": hardware.machine(),
            "system": hardware.system(),
            "versions": {library: version(library) for library in LIBRARIES},
            "made_from": made_from,
            "recipe": plain(recipe),
            "artefacts": checksums.of(work, SCRATCH),
        }
        checksums.write(work, about)
        _put_in_place(work, finished)
        print(f"{stage.name}: done in {about['seconds']:.0f} s", flush=True)


def _is_reused(stage: Stage, finished: Path, key: str) -> bool:
    """Whether another cell of this sweep has made the same; not the report, which also tells where its run lies.

    A run on its own takes over nothing: whoever repeats one wants to see it come out again.
    """
    if processes.CELL not in os.environ or stage.name == "report":
        return False
    sibling = siblings.reuse(finished, key)
    if sibling:
        print(f"{stage.name}: taken over from {sibling}", flush=True)
    return sibling is not None


def _is_done(stage: Stage, recipe: Recipe, finished: Path, work: Path, made_from: dict, key: str) -> bool:
    """Whether there is nothing to do; says so, or why the stage runs. On rank 0."""
    last = checksums.read(work) or {}
    if last.get("key") == key and "finished" in last and not checksums.damaged(work):
        _put_in_place(work, finished)  # a kill came just before
    why = why_again(finished, made_from, stage.name in recipe.rerun)
    if why is None:
        print(f"{stage.name}: done before", flush=True)
        return True
    if stage.name not in recipe.rerun and _is_reused(stage, finished, key):
        return True
    print(f"{stage.name}: {why + ': running again' if why else 'running'}", flush=True)
    return False


def why_again(finished: Path, made_from: dict, forced: bool = False) -> str | None:
    """Why a stage is to run: "" for the first time, else what differs; None where what is there is whole and the same."""
    before = checksums.read(finished) or {}
    if before.get("key") != files.digest(made_from):
        if before:
            return _difference(before["made_from"], made_from)
        return f"{finished / checksums.OWN} is damaged or missing" if finished.exists() else ""
    if forced:
        return f"rerun={finished.name}"
    if damaged := checksums.damaged(finished):
        return f"{finished / damaged[0]} is damaged or missing ({len(damaged)} in all)"
    return None


def _put_in_place(work: Path, finished: Path) -> None:
    """Only a stage that is known to be finished needs nothing to go on from."""
    for name in SCRATCH:
        shutil.rmtree(work / name, ignore_errors=True)
    old = finished.with_name(f".{finished.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if finished.exists():
        finished.rename(old)
    work.rename(finished)
    shutil.rmtree(old, ignore_errors=True)


def outcome_of(finished: Path) -> str:
    """Tells a finished stage from any other: a damaged one that is made again may come out otherwise, as on another GPU."""
    about = checksums.read(finished)
    made = {name: entry["sha256"] for name, entry in about["artefacts"].items() if name.endswith(OUTCOME)}
    return files.digest({"key": about["key"], "made": made})


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """The run folder belongs to this run; and all machines see the same one."""
    with lock.held(run_dir) if processes.is_main() else nullcontext() as token:
        token = processes.from_main(token)
        blind = processes.several_nodes() and not lock.is_seen(run_dir, token)
        if hosts := sorted({host for host in processes.all_ranks(socket.gethostname() if blind else None) if host}):
            raise UserError(
                f"run_dir={run_dir} as seen on {', '.join(hosts)} is not that of the main process: it must lie on a file "
                "system that all machines share: set run_dir=/SHARED/..."
            )
        yield


def _refuse_other_settings(recipe: Recipe) -> None:
    mine = asdict(recipe)
    for rank, theirs in enumerate(processes.all_ranks(mine)):
        if theirs != mine:
            difference = _difference(mine, theirs)
            raise UserError(
                f"process {rank} was started with other settings than process {processes.rank()} ({difference}): run the "
                "same command on all machines"
            )


@contextmanager
def _traceback_kept(run_dir: Path) -> Iterator[None]:
    """What is no message to the user is a fault of ours: its traceback goes to a file, for one line cannot tell it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError | OSError) and not processes.is_of_a_lost_peer(error):
            with suppress(OSError):
                run_dir.mkdir(parents=True, exist_ok=True)
                (run_dir / f"traceback-{processes.rank()}.txt").write_text(traceback.format_exc())
        raise


def _read_from_outside(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What the stages read from outside, so that a changed model, text, task or method of the user's own is seen, and a
    missing one before any work."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for stage in STAGES.values():
        found[stage.name]["code"] = own_fingerprint(stage, recipe)
    for name in recipe.stages:
        if own := own_code(section(recipe, name) if hasattr(recipe, name) else {}):
            found[name]["own_code"] = files.fingerprint(own)
    if "evaluate" in recipe.stages:
        asked = (recipe.mirror, recipe.evaluate.fewshot)
        found["evaluate"]["tasks"] = {name: tasks.identity(name, *asked) for name in recipe.evaluate.tasks}
    if recipe.model is not None:
        identity = model_files.identity(loading.locate(recipe.model, recipe.revision))
        for name in ("prune", "evaluate"):
            found[name]["model"] = identity
    for name in ("prune", "reconstruct", "finetune", "evaluate"):
        if name in recipe.stages:
            texts = {str(source): sources.identity(source) for source in sources.of_stage(recipe, name)}
            found[name]["data"] = texts
    return found


def own_fingerprint(stage: Stage, recipe: Recipe) -> dict[str, str]:
    """Of the project's code that decides what the stage writes, by package: of the methods, those that the recipe chooses."""
    chosen = []
    for key in registry.REGISTRIES:
        if key.partition(".")[0] in stage.settings:
            implementation = registry.REGISTRIES[key].entry(registry.value_of(recipe, key)).implementation
            if isinstance(implementation, str):
                chosen.append(implementation.partition(":")[0])
            else:  # a class of the user's, which builds on classes of the project
                chosen += [base.__module__ for base in implementation.__mro__]
    return code.fingerprint(f"pipeline.stages.{stage.name}", *chosen, without=stage.display)


def _difference(before: dict, now: dict, prefix: str = "") -> str:
    """The first setting that differs, as `finetune.lr 0.1 -> 0.2`; else the code that does."""
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key == "code", key)):
        old, new = before.get(key), now.get(key)
        if key == "code" and old != new:
            old = old if isinstance(old, dict) else {}  # of a version that did not look
            return f"the code of {', '.join(sorted(name for name in new if old.get(name) != new[name]))} changed"
        if isinstance(old, dict) and isinstance(new, dict):
            if old != new:
                return _difference(old, new, f"{prefix}{key}.")
        elif old != new:
            return f"{prefix}{key} {old} -> {new}"
    return "unfinished"
