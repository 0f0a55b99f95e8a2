"""Locates lm-eval tasks and their data: task names -> definitions that lm-eval loads, with data from mirror or hub."""

import copy
import functools
import glob
import os
import re
import tempfile
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pipeline.runtime import caches
from pipeline.runtime.errors import UserError

# these dataset_paths read files that the task names; any other is a hub repository
LOCAL_FORMATS = ("arrow", "csv", "json", "parquet", "text")
DEFINITION = re.compile(rb"""^["']?(?:task|group)["']?:[ \t]*["']?([^\s"'#\[\]]+)""", re.MULTILINE)
FEWSHOT_SEED = 1234  # lm-eval's default


def check_tasks(names: list[str], mirror: str | None = None, fewshot: int = 0) -> None:
    """Raises `UserError` if a task is unknown or its data is missing in the mirror. Reads no data; takes a second or two."""
    plan(names, mirror, fewshot)


def hub_data(names: list[str]) -> dict[str, str]:
    """{task: hub data set} for the tasks that read one."""
    entries: dict[str, Any] = {}
    plan(names, None, 0, entries)
    read = {name: (entry.cfg or {}).get("dataset_path") for name, entry in entries.items()}
    return {name: str(path) for name, path in read.items() if path and path not in LOCAL_FORMATS}


def load_tasks(names: list[str], mirror: str | None = None, fewshot: int = 0) -> dict:
    """lm-eval's task and group objects with their data, for `lm_eval.evaluate`.

    A name is one of `pipeline.data.world.TASKS`, an lm-eval task, group or tag, a .yaml file, or a folder of them (with a
    slash, such as ./tasks). With a mirror (<org>/<name>/<config>/<split>-*.parquet), all data is read there and nothing is
    downloaded. `fewshot` is the number of examples, except for tasks that fix it at 0. Raises `UserError` if loading fails.
    """
    from lm_eval.tasks import TaskManager

    wanted, definitions = plan(names, mirror, fewshot)
    with tempfile.TemporaryDirectory() as folder:
        for number, definition in enumerate(copy.deepcopy(definitions)):
            data_files = definition.get("dataset_kwargs", {}).get("data_files", {})
            for split, paths in data_files.items():  # datasets would treat the paths as glob patterns
                data_files[split] = list(map(glob.escape, paths))
            Path(folder, f"{number}.yaml").write_text(yaml.safe_dump(definition))
        try:
            loaded = TaskManager(include_path=folder, include_defaults=False).load(wanted)
        except Exception as error:  # lm-eval, datasets, pyarrow and the hub raise their own types
            if cache := caches.problem(error):
                raise UserError(cache) from error
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"cannot load {', '.join(names)} of lm-eval, or its data: {reason}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", fewshot)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def plan(
    names: list[str], mirror: str | None, fewshot: int, entries: dict[str, Any] | None = None
) -> tuple[list[str | dict], list[dict]]:
    """What lm-eval should load, and the definitions (YAML as dicts) of all tasks and groups behind it.

    A definition includes lm-eval's own file and overrides only where the data is, which lm-eval documents. `entries`
    collects lm-eval's index entries by name.
    """
    from pipeline.data.world import TASKS

    wanted: list[str | dict] = []
    entries = {} if entries is None else entries
    for name in names:
        if name in TASKS:
            wanted.append(copy.deepcopy(TASKS[name]))
        elif name.endswith(".yaml") or "/" in name:
            wanted += _add_own(Path(name).expanduser().resolve(), entries)
        else:
            wanted.append(name)
            _add_packaged(name, entries)
    on_disk = [entry for entry in entries.values() if entry.yaml_path]  # a tag has no file, but its tasks do
    return wanted, [{"include": str(entry.yaml_path), **_data(entry, entries, mirror, fewshot)} for entry in on_disk]


def _add_own(path: Path, entries: dict[str, Any]) -> list[str]:
    """The names of the tasks in a user's file or folder. Adds the index entries of these tasks and of a group's members."""
    if not path.exists():
        raise UserError(f"no task at {path}: set an lm-eval task, its .yaml file, or a folder of such files")
    index = _read_index(path if path.is_dir() else path.parent)  # not cached: its files may change
    if path.is_dir():
        chosen = [name for name, entry in index.items() if entry.kind.name in ("TASK", "PY_TASK")]
    else:
        chosen = [name for name, entry in index.items() if entry.yaml_path and entry.yaml_path.resolve() == path]
    if not chosen:
        raise UserError(f"no lm-eval task in {path}: it needs a line `task: <name>`")
    for name in chosen:
        if not _collect(name, index, entries):
            _collect(name, {**_index(), **index}, entries)
    return chosen


def _add_packaged(name: str, entries: dict[str, Any]) -> None:
    """Adds the index entries of an lm-eval task, or of a group or tag and its members."""
    from pipeline.data.world import TASKS

    definitions = _definitions()
    if name in definitions and _collect(name, _index(definitions[name].parent), entries):
        return
    if not _collect(name, _index(), entries) and name not in _index():  # a tag, or a group with members elsewhere
        close = get_close_matches(name, [*TASKS, *definitions], n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists all tasks"
        raise UserError(f"unknown task '{name}': {hint}")


@functools.lru_cache
def _definitions() -> dict[str, Path]:
    """{task or group: its file} of the installed lm-eval, found with one regular expression.

    lm-eval's own index parses the YAML of its 14,000 files, 5 to 10 s; this takes 0.2 s (2 s from a cold disk). In
    0.4.13 both name the same file for all tasks and groups; tags are left out. As there, the first of a name counts.
    """
    spec = find_spec("lm_eval")
    assert spec and spec.submodule_search_locations
    found: dict[str, Path] = {}
    root = os.path.join(spec.submodule_search_locations[0], "tasks")
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    for file in sorted(path for path in paths if path.endswith(".yaml")):
        with open(file, "rb") as opened:
            for name in DEFINITION.findall(opened.read()):
                found.setdefault(name.decode(), Path(file))
    return found


@functools.lru_cache
def _index(folder: Path | None = None) -> dict[str, Any]:
    """lm-eval's index of a folder of its task files, or of all (slow)."""
    return _read_index(folder)


def _read_index(folder: Path | None) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=folder is None).task_index


def _collect(name: str, index: dict[str, Any], entries: dict[str, Any]) -> bool:
    """Adds the entries of `name` and its members; False if some are not in the index."""
    if name not in index:
        return False
    entries[name] = index[name]
    return all([member in entries or _collect(member, index, entries) for member in _members(index[name])])


def _members(entry: Any) -> list[str]:
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    children = entry.cfg["task"] if entry.kind.name == "GROUP" else []
    children = children if isinstance(children, list) else [children]
    return [child if isinstance(child, str) else child.get("group") or child.get("task", "") for child in children]


def _data(entry: Any, entries: dict[str, Any], mirror: str | None, fewshot: int) -> dict:
    """The settings that make lm-eval read a task's data from the mirror; {} if nothing needs to change."""
    name, config = entry.name, entry.cfg
    if config.get("unsafe_code") or config.get("doc_to_image") or config.get("doc_to_audio"):
        raise UserError(f"task '{name}' runs code that the model writes, or needs pictures or sound: remove it")
    if mirror is None:
        return {}
    if entry.kind.name == "GROUP":
        if "'dataset_path'" in repr(config) or not all(member in entries for member in _members(entry)):
            raise UserError(f"group '{name}' defines tasks inline, which a mirror cannot serve: set single tasks")
        return {}
    dataset, settings = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if dataset in LOCAL_FORMATS and "://" not in str(settings):
        return {}
    if not dataset or "class" in config or "custom_dataset" in config or settings.keys() & {"data_files", "data_dir"}:
        raise UserError(f"task '{name}' loads its data with its own code, which a mirror cannot serve: remove it")
    changes: dict[str, Any] = {"dataset_path": "parquet", "dataset_name": None}
    splits = [config.get("test_split") or config.get("validation_split")]
    if fewshot and config.get("num_fewshot") != 0:
        splits += _fewshot_split(config)
    else:  # else lm-eval reads the training split, which a mirror may lack, only to draw no example from it
        changes |= {"training_split": None, "fewshot_split": None, "fewshot_config": {"samples": []}}
    folder = _folder(Path(mirror, dataset), config.get("dataset_name"))
    data_files = {split: _files(name, folder, split) for split in dict.fromkeys(splits) if split}
    return changes | {"dataset_kwargs": {"data_files": data_files}}


def _fewshot_split(config: dict) -> list[str | None]:
    """The split that lm-eval draws examples from, as in its `ConfigurableTask.fewshot_docs`."""
    own = config.get("fewshot_config") or {}
    if not (own.get("split") or config.get("fewshot_split")) and own.get("samples"):
        return []
    splits = (config.get(f"{kind}_split") for kind in ("fewshot", "training", "validation", "test"))
    return [split for split in (own.get("split"), *splits) if split][:1]


def _folder(dataset: Path, config: str | None) -> Path:
    """The folder of a dataset's configuration; if the task names none, `default` or the only one there is."""
    if config is None and not (dataset / "default").is_dir():
        folders = [path for path in dataset.glob("*") if path.is_dir()]
        if len(folders) == 1:
            return folders[0]
    return dataset / (config or "default")


def _files(task: str, folder: Path, split: str) -> list[str]:
    found = sorted(str(path) for path in folder.glob(f"{glob.escape(split)}-*.parquet"))
    if not found:
        raise UserError(f"task '{task}': no {folder}/{split}-*.parquet in the mirror: add it, or remove the task")
    return found
