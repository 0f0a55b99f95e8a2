"""A stage's key: a hash of everything that determines its result. Also says why a finished stage has to run again."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from pipeline import registry
from pipeline.data import sources
from pipeline.evaluation import task_identity
from pipeline.models import loading, model_files
from pipeline.runtime import checksums, code, files
from pipeline.settings.schema import READERS, STAGES, Recipe, Stage, own_code, section

# what a stage is made from besides settings, and the words for it
INPUTS = {
    "model": "the model folder",
    "own_code": "your code",
    "data": "",
    "tasks": "the task ",
    "read": "the result of ",
    "code": "the code of ",
}
CHANGED = "changed"
OUTCOME = (".safetensors", "results.json")  # the files that other stages read; tables also hold times


def made_from(stage: Stage, recipe: Recipe, outcomes: dict[str, str], external: dict) -> dict[str, Any]:
    """Everything that determines a stage's result; its digest is the stage's key. `external`: see `external_inputs`."""
    settings = {name: section(recipe, name) for name in stage.settings}
    return {**settings, "read": read_by(stage, outcomes), **external.get(stage.name, {})}


def read_by(stage: Stage, outcomes: dict[str, str]) -> dict[str, str]:
    """The `outcomes` of the earlier stages that a stage reads."""
    return {name: outcomes[name] for name in (outcomes if stage.reads is None else stage.reads) if name in outcomes}


def outcome_of(finished: Path) -> str:
    """A hash of a finished stage's key and files. The key alone is not enough: a stage that runs again, for instance on
    another GPU, may write different files."""
    content = checksums.read(finished)
    made = {name: entry["sha256"] for name, entry in content["artefacts"].items() if name.endswith(OUTCOME)}
    return files.digest({"key": content["key"], "made": made})


def reason_to_run(finished: Path, made_from: dict, forced: bool = False) -> str | None:
    """Why a stage has to run: "" if it has not run before, else what changed. None if it is finished, intact and unchanged."""
    before = checksums.read(finished) or {}
    if before.get("key") != files.digest(made_from):
        if before:
            return _reason(before["made_from"], made_from)
        return f"{finished / checksums.STAGE_FILE} is damaged or missing" if finished.exists() else ""
    if forced:
        return f"rerun={finished.name}"
    if damaged := checksums.damaged(finished):
        return f"{finished / damaged[0]} is damaged or missing ({len(damaged)} in all)"
    return None


def difference(before: dict, now: dict, prefix: str = "") -> str:
    """The first setting that differs, such as `finetune.lr 0.1 -> 0.2`."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if old != new:
                return difference(old, new, f"{prefix}{key}.")
        elif change := _change(key, before, now):
            return f"{prefix}{key} {old} -> {new}" if change == CHANGED else f"{prefix}{key} {change}"
    return "none"


def _reason(before: dict, now: dict) -> str:
    """What differs between two results of `made_from`: a setting, else an input, whose hash says nothing to a reader, else the
    project's code."""
    settings = [{key: value for key, value in content.items() if key not in INPUTS} for content in (before, now)]
    if settings[0] != settings[1]:
        return difference(*settings)
    for key in ("model", "own_code"):
        if change := _change(key, before, now):
            return f"{INPUTS[key]} {change}"
    for kind in ("data", "tasks", "read"):
        old, new = before.get(kind) or {}, now.get(kind) or {}
        for name in sorted(old.keys() | new.keys()):
            if change := _change(name, old, new):
                return f"{INPUTS[kind]}{name} {change}"
    old, new = before.get("code"), now.get("code") or {}
    old = old if isinstance(old, dict) else {}  # written by a version without it
    packages = sorted(name for name in new if old.get(name) != new[name])
    return f"{INPUTS['code']}{', '.join(packages)} changed" if packages else "unfinished"


def _change(key: str, before: dict, now: dict) -> str | None:
    if (key in before) != (key in now):
        return "is new" if key in now else "was left out"
    return CHANGED if before.get(key) != now.get(key) else None


def external_inputs(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Fingerprints, by stage, of its inputs from outside the run: model, data, tasks, the user's Python files and the project's
    code. Raises `UserError` if one is missing."""
    external: dict[str, dict[str, Any]] = defaultdict(dict)
    for stage in STAGES.values():
        external[stage.name]["code"] = stage_code(stage, recipe)
    for name in recipe.stages:
        if paths := own_code(section(recipe, name) if hasattr(recipe, name) else {}):
            external[name]["own_code"] = files.fingerprint(paths)
    if "evaluate" in recipe.stages:
        settings = recipe.evaluate
        external["evaluate"]["tasks"] = {
            name: task_identity.identity(name, recipe.mirror, settings.fewshot) for name in settings.tasks
        }
    if recipe.model is not None:
        identity = model_files.identity(loading.locate(recipe.model, recipe.revision))
        for name in ("permute", "prune", "evaluate"):
            external[name]["model"] = identity
    for name in READERS:
        if name in recipe.stages:
            texts = {str(source): sources.identity(source) for source in sources.of_stage(recipe, name)}
            external[name]["data"] = texts
    return external


def stage_code(stage: Stage, recipe: Recipe) -> dict[str, str]:
    """Hashes, by package, of the project's code that determines a stage's result. Includes only the chosen methods."""
    modules = []
    for key, entries in registry.REGISTRIES.items():
        if key.partition(".")[0] in stage.settings:
            implementation = entries.entry(registry.value_of(recipe, key)).implementation
            if isinstance(implementation, str):
                modules.append(implementation.partition(":")[0])
            else:  # a user's class: its base classes in the project
                modules += [base.__module__ for base in implementation.__mro__]
    return code.fingerprint(f"pipeline.stages.{stage.name}", *modules, without=stage.display)
