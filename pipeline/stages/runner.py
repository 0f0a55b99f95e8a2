"""Runs the stages of the table (settings/schema.py) that are not done.

A stage is done when `<run_dir>/<stage>/stage.json` holds its current key (stages/keys.py). A stage works in
`<run_dir>/.<stage>/`, which is renamed when it is complete, so the same command resumes a run.
"""

import importlib
import os
import shutil
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.reporting.report import show
from pipeline.runtime import checksums, deterministic, files, hardware, lock, memory, processes
from pipeline.runtime.errors import UserError
from pipeline.runtime.versions import versions
from pipeline.settings.schema import STAGES, Recipe, Stage, plain
from pipeline.stages import keys, out_of_memory, preflight, siblings, space

SCRATCH = ("masks", "checkpoints")  # folders from which an unfinished stage resumes
# imported here, so that the forked cells of a sweep import nothing
MODULES = {name: importlib.import_module(f"pipeline.stages.{name}") for name in STAGES}


def run(recipe: Recipe) -> None:
    """Runs the stages that are not done, and prints the results."""
    run_dir = Path(recipe.run_dir)
    deterministic.prepare(recipe.deterministic)
    with processes.together(recipe.timeout_minutes, recipe.threads), _traceback_kept(run_dir):
        _refuse_other_settings(recipe)
        external = check(recipe)
        with _locked(run_dir):
            if processes.is_main():
                preflight.check_disk(recipe)
            outcomes: dict[str, str] = {}
            for stage in chosen(recipe):
                inputs = {name: run_dir / name for name in keys.read_by(stage, outcomes)}
                _run_one(stage, recipe, run_dir, inputs, keys.made_from(stage, recipe, outcomes, external))
                outcome = keys.outcome_of(run_dir / stage.name) if processes.is_main() else None
                outcomes[stage.name] = processes.from_main(outcome)
            if processes.is_main() and "report" in outcomes:
                show(run_dir, stages=outcomes)


def chosen(recipe: Recipe) -> list[Stage]:
    """The stages of the run, in order."""
    return [stage for stage in STAGES.values() if stage.name in recipe.stages]


def check(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Raises `UserError` for what would fail later; returns `keys.external_inputs`. All ranks must call."""
    external = processes.from_main(keys.external_inputs(recipe) if processes.is_main() else None)
    for stage in chosen(recipe):
        if check := getattr(MODULES[stage.name], "check", None):
            check(recipe)
    preflight.check(recipe)
    return external


def _run_one(stage: Stage, recipe: Recipe, run_dir: Path, inputs: dict[str, Path], made_from: dict) -> None:
    finished, work, key = run_dir / stage.name, run_dir / f".{stage.name}", files.digest(made_from)
    if processes.from_main(processes.is_main() and _is_done(stage, recipe, finished, work, made_from, key)):
        return
    if processes.is_main():
        begun = checksums.read(work)
        if begun is None and (work / checksums.STAGE_FILE).exists():
            print(f"{stage.name}: {work / checksums.STAGE_FILE} is damaged: starting over", flush=True)
        if (begun or {}).get("key") != key:
            shutil.rmtree(work, ignore_errors=True)
            checksums.write(work, {"key": key, "stage": stage.name})
        for leftover in work.rglob(".*.part"):
            if leftover.is_file():  # the export stage removes the folder of a half export itself
                leftover.unlink()
        space.check(stage.name, recipe, inputs, work)
    processes.barrier()
    memory.free_memory()
    memory.reset_peak(processes.device())
    started, computed = time.perf_counter(), time.process_time()
    with out_of_memory.as_user_error(stage.name, recipe):
        MODULES[stage.name].run(recipe, work, inputs)
    cpu_seconds = sum(processes.all_ranks(time.process_time() - computed))
    memory_gib = max(processes.all_ranks(memory.peak_gib(processes.device())))
    if processes.is_main():
        files.apply_umask(work)
        content = {
            "key": key,
            "stage": stage.name,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(cpu_seconds, 1),  # of all processes; comparable on a busy machine
            "processes": processes.world_size(),
            "memory_gib": round(memory_gib, 3),  # of the process with the highest peak
            "machine": hardware.machine(),
            "system": hardware.system(),
            "versions": versions(),
            "made_from": made_from,
            "recipe": plain(recipe),
            "artefacts": checksums.of_folder(work, SCRATCH),
        }
        checksums.write(work, content)
        _put_in_place(work, finished)
        print(f"{stage.name}: done in {content['seconds']:.0f} s", flush=True)


def _is_reused(stage: Stage, finished: Path, key: str) -> bool:
    """Links the stage from another cell of this sweep, if one has the same key. Not the report, which names its run folder.

    An ordinary run reuses nothing: a repeated run is expected to compute its results again.
    """
    if processes.CELL not in os.environ or stage.name == "report":
        return False
    sibling = siblings.reuse(finished, key)
    if sibling:
        print(f"{stage.name}: reused from {sibling}", flush=True)
    return sibling is not None


def _is_done(stage: Stage, recipe: Recipe, finished: Path, work: Path, made_from: dict, key: str) -> bool:
    """Whether the stage need not run; prints so, or why it runs. On rank 0."""
    last = checksums.read(work) or {}
    if last.get("key") == key and "finished" in last and not checksums.damaged(work):
        _put_in_place(work, finished)  # the run was killed just before this
    reason = keys.reason_to_run(finished, made_from, stage.name in recipe.rerun)
    if reason is None:
        print(f"{stage.name}: done before", flush=True)
        return True
    if stage.name not in recipe.rerun and _is_reused(stage, finished, key):
        return True
    print(f"{stage.name}: {reason + ': running again' if reason else 'running'}", flush=True)
    return False


def _put_in_place(work: Path, finished: Path) -> None:
    """Replaces the stage's folder by the finished work, without what only a resumed run needs."""
    for name in SCRATCH:
        shutil.rmtree(work / name, ignore_errors=True)
    old = finished.with_name(f".{finished.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if finished.exists():
        finished.rename(old)
    work.rename(finished)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Holds the run folder's lock, and checks that all machines see the same folder."""
    with lock.held(run_dir) if processes.is_main() else nullcontext() as token:
        token = processes.from_main(token)
        hidden = processes.several_nodes() and not lock.is_visible(run_dir, token)
        if hosts := sorted({host for host in processes.all_ranks(socket.gethostname() if hidden else None) if host}):
            raise UserError(
                f"run_dir={run_dir} on {', '.join(hosts)} is not the main process's folder: set run_dir=/SHARED/... on a file "
                "system that all machines share"
            )
        yield


def _refuse_other_settings(recipe: Recipe) -> None:
    mine = asdict(recipe)
    for rank, theirs in enumerate(processes.all_ranks(mine)):
        if theirs != mine:
            raise UserError(
                f"process {rank} was started with other settings than process {processes.rank()} "
                f"({keys.difference(mine, theirs)}): run the same command on all machines"
            )


@contextmanager
def _traceback_kept(run_dir: Path) -> Iterator[None]:
    """Writes the traceback of an unexpected error, a bug, to a file: the user only sees one line."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError | OSError) and not processes.is_lost_peer(error):
            with suppress(OSError):
                run_dir.mkdir(parents=True, exist_ok=True)
                (run_dir / f"traceback-{processes.rank()}.txt").write_text(traceback.format_exc())
        raise
