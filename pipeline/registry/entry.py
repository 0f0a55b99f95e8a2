"""Owns what a registry is: the values of a setting, each with all that is known of it; and the user's own Python files."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError, did_you_mean

NONE = "none"  # the entry of a registry whose step can be left out


@dataclass(frozen=True)
class Citation:
    authors: str
    year: int
    title: str
    where: str  # arXiv:NUMBER, or the venue

    def __str__(self) -> str:
        return f'{self.authors} {self.year}, "{self.title}" ({self.where})'


@dataclass(frozen=True)
class Entry:
    name: str  # what a recipe says
    label: str  # what people say
    description: str  # one sentence
    implementation: str | type  # module:Class, loaded when it is used; of a user's file, the class
    citation: Citation | str | None = None
    reads: tuple[str, ...] = ()  # settings of the same section that not all entries read

    def load(self) -> type:
        return _resolve(self.implementation) if isinstance(self.implementation, str) else self.implementation

    def problem(self, settings: Any) -> str | None:
        """Why the section that names this entry cannot hold, and what to set; or None."""
        return None

    def about(self) -> dict[str, str]:
        """What a run records, so that its report need not run the user's file."""
        return {"label": self.label, "description": self.description, "citation": str(self.citation or "")}


class Registry:
    """The values that the setting `key` may have: the name of an entry, or the path of a Python file with one subclass of
    `base` ("module:Class").

    What is known of a user's class is what the entry of its nearest base class says, but for what the class sets itself, as
    attributes with the names of an entry's fields. Its label is the file's name unless it sets one.
    """

    def __init__(self, key: str, base: str, *entries: Entry) -> None:
        self.key, self.base = key, base
        self.entries = {entry.name: entry for entry in entries}

    def entry(self, value: Any, key: str | None = None) -> Entry:
        """`UserError` naming `key` for an unknown name, or a file that is missing or damaged. Runs a user's file."""
        key = key or self.key
        if is_file(value):
            return self._own(Path(str(value)), key)
        if value not in self.entries:
            raise UserError(
                f"{key}={value} is neither known nor a .py file{did_you_mean(str(value), list(self.entries))}"
            )
        return self.entries[value]

    def label(self, value: Any) -> str:
        """Without running a user's file."""
        if is_file(value):
            return Path(str(value)).stem
        return self.entries[value].label if value in self.entries else str(value)

    def _own(self, path: Path, key: str) -> Entry:
        if not path.is_file():
            raise UserError(f"{key}={path}: no such file")
        stat = path.stat()
        found = _subclass_in(path, (stat.st_mtime_ns, stat.st_size), self.base, key)
        names = [f"{base.__module__}:{base.__qualname__}" for base in found.__mro__]
        entries = sorted(self.entries.values(), key=lambda it: (*names, it.implementation).index(it.implementation))
        nearest, kind = entries[0], type(entries[0])
        known = dataclasses.asdict(nearest) if nearest.implementation in names else {}
        known |= {"name": str(path), "label": path.stem, "implementation": found, "citation": None}
        known["description"] = (found.__dict__.get("__doc__") or "").strip().partition("\n")[0]
        own = {f.name: getattr(found, f.name, None) for f in dataclasses.fields(kind)}
        own = {name: value for name, value in own.items() if value is not None and not callable(value)}
        own |= {name: " ".join(str(own[name]).split()) for name in ("label", "description") if name in own}
        return kind(**known | own)


def is_file(value: Any) -> bool:
    """Whether a setting names a Python file of the user's."""
    return str(value).endswith(".py")


def _resolve(place: str) -> type:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


@functools.lru_cache
def _subclass_in(path: Path, stamp: tuple[int, int], base_place: str, key: str) -> type:
    """The one subclass of the base that a Python file defines. A file is run once, until its time or size changes."""
    base = _resolve(base_place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"{key}={path} does not load: {type(error).__name__}: {error} (debug=true shows the traceback)"
        ) from error
    found = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, base) and member.__module__ == path.stem
    ]
    if len(found) != 1:
        raise UserError(f"{key}={path} defines {len(found)} subclasses of {base.__name__}: define exactly one")
    return found[0]
