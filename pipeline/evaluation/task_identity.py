"""What an lm-eval task asks, as a hash: a task that asks something else is asked again."""

import glob
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.data import world
from pipeline.evaluation.tasks import plan
from pipeline.runtime import files


def identity(name: str, mirror: str | None = None, fewshot: int = 0) -> str:
    """Changes with what a task asks: lm-eval's version, the task's definition with what it includes, its Python files, and its
    data if that is local."""
    entries: dict[str, Any] = {}
    _, definitions = plan([name], mirror, fewshot, entries)
    read: set[Path] = {Path(world.__file__)} if name in world.TASKS else set()
    settings = [_named_by_file(entries[key].cfg, read) for key in sorted(entries)]  # with what the files include
    for config in [*definitions, *(entry.cfg or {} for entry in entries.values())]:
        read |= set(_local_data(config))
    return f"lm-eval {version('lm_eval')}, {files.digest([settings, files.fingerprint(read)])}"


def _named_by_file(value: Any, python: set[Path]) -> Any:
    """A definition as plain data. lm-eval gives each of its functions as /folder/file.function: the folder is left out, and the
    file is added to `python`."""
    if isinstance(value, dict):
        return {str(key): _named_by_file(item, python) for key, item in value.items()}
    if isinstance(value, list):
        return [_named_by_file(item, python) for item in value]
    if isinstance(value, str) and value.startswith("/") and os.path.isfile(file := value.rpartition(".")[0] + ".py"):
        python.add(Path(file))
        return Path(value).name
    return value if isinstance(value, str | int | float | None) else str(value)


def _local_data(config: dict) -> Iterator[Path]:
    """The files of this machine that a task reads."""
    settings = config.get("dataset_kwargs") or {}
    folder, found = settings.get("data_dir"), settings.get("data_files") or []
    parts = found.values() if isinstance(found, dict) else [found]
    paths = [path for part in parts for path in (part if isinstance(part, list) else [part])]
    for path in (os.path.join(folder or "", str(path)) for path in paths):
        matches = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
        yield from filter(Path.is_file, map(Path, matches))
    for place in (config.get("dataset_path"), None if paths else folder):
        if place and os.path.isdir(place):
            yield from filter(Path.is_file, Path(place).rglob("*"))
