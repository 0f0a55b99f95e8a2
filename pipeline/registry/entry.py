"""`Registry`: the allowed values of one setting, built-in entries or a user's Python file."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError, did_you_mean

NONE = "none"  # the entry that leaves the step out


@dataclass(frozen=True)
class Citation:
    authors: str
    year: int
    title: str
    source: str  # arXiv:NUMBER, or the venue

    def __str__(self) -> str:
        return f'{self.authors} {self.year}, "{self.title}" ({self.source})'


@dataclass(frozen=True)
class Entry:
    name: str  # the value in a recipe
    label: str  # the name in reports
    description: str  # one sentence
    implementation: str | type  # "module:Class", loaded when it is used; the class for a user's file
    citation: Citation | str | None = None
    reads: tuple[str, ...] = ()  # settings of the same section that only some entries read

    def load(self) -> type:
        return _resolve(self.implementation) if isinstance(self.implementation, str) else self.implementation

    def problem(self, settings: Any) -> str | None:
        """What is wrong with the settings of this entry's section, and what to set; None if they are valid."""
        return None

    def about(self) -> dict[str, str]:
        """Recorded in the run, so that its report does not have to run the user's file."""
        return {"label": self.label, "description": self.description, "citation": str(self.citation or "")}


class Registry:
    """The allowed values of the setting `key`: the name of an entry, or the path of a Python file that defines one subclass
    of `base` ("module:Class").

    The entry of a user's class takes its fields from the entry of the nearest registered base class. A class attribute with a
    field's name overrides that field. The default label is the file's name.
    """

    def __init__(self, key: str, base: str, *entries: Entry) -> None:
        self.key, self.base = key, base
        self.entries = {entry.name: entry for entry in entries}

    def entry(self, value: Any, key: str | None = None) -> Entry:
        """Runs a user's file. Raises `UserError`, which names `key`, for an unknown name or a file that does not load."""
        key = key or self.key
        if is_file(value):
            return self._file_entry(Path(str(value)), key)
        if value not in self.entries:
            raise UserError(
                f"{key}={value} is neither known nor a .py file{did_you_mean(str(value), list(self.entries))}"
            )
        return self.entries[value]

    def label(self, value: Any) -> str:
        """Does not run a user's file."""
        if is_file(value):
            return Path(str(value)).stem
        return self.entries[value].label if value in self.entries else str(value)

    def _file_entry(self, path: Path, key: str) -> Entry:
        if not path.is_file():
            raise UserError(f"{key}={path}: no such file")
        stat = path.stat()
        cls = _subclass_in(path, (stat.st_mtime_ns, stat.st_size), self.base, key)
        bases = [f"{base.__module__}:{base.__qualname__}" for base in cls.__mro__]
        registered = [entry for entry in self.entries.values() if entry.implementation in bases]
        nearest = min(registered, key=lambda entry: bases.index(entry.implementation), default=None)
        fields = dataclasses.asdict(nearest) if nearest else {}
        entry_type = type(next(iter(self.entries.values())))  # the same for all of a registry
        fields |= {"name": str(path), "label": path.stem, "implementation": cls, "citation": None}
        fields["description"] = (cls.__dict__.get("__doc__") or "").strip().partition("\n")[0]
        overrides = {f.name: getattr(cls, f.name, None) for f in dataclasses.fields(entry_type)}
        # a method of the class may have a field's name, such as `update`
        overrides = {name: value for name, value in overrides.items() if value is not None and not callable(value)}
        for name in ("label", "description"):
            if name in overrides:
                overrides[name] = " ".join(str(overrides[name]).split())
        return entry_type(**fields | overrides)


def is_file(value: Any) -> bool:
    """Whether a setting's value is the path of a user's Python file."""
    return str(value).endswith(".py")


def _resolve(class_path: str) -> type:
    module, _, name = class_path.partition(":")
    return getattr(importlib.import_module(module), name)


@functools.lru_cache
def _subclass_in(path: Path, stamp: tuple[int, int], base_path: str, key: str) -> type:
    """The one subclass of the base that a Python file defines. The file runs again only if `stamp`, its time and size,
    changes."""
    base = _resolve(base_path)
    name = path.name  # with .py, so that it hides no module that can be imported
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where dataclasses look up annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"{key}={path} does not load: {type(error).__name__}: {error} (debug=true shows the traceback)"
        ) from error
    classes = {member for _, member in inspect.getmembers(module, inspect.isclass)}
    found = [member for member in classes if issubclass(member, base) and member.__module__ == name]
    if len(found) != 1:
        raise UserError(f"{key}={path} defines {len(found)} subclasses of {base.__name__}: define exactly one")
    return found[0]
