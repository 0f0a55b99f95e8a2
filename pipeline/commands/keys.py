"""`espalier keys [SECTION]`: all settings of recipes with default, range and meaning. Imports no torch."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from pipeline.commands.table import lines
from pipeline.runtime.errors import UserError, did_you_mean
from pipeline.settings.schema import Recipe


def main(arguments: list[str]) -> None:
    sections = {f.name: f.type for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(f.type)}
    if len(arguments) > 1:
        raise UserError(f"keys takes one section, not {len(arguments)}: choose one of {', '.join(sections)}")
    if arguments and arguments[0] not in sections:
        raise UserError(f"no section '{arguments[0]}'{did_you_mean(arguments[0], list(sections))}")
    rows = [("key", "default", "range", "meaning")]
    if not arguments:
        rows += _rows(Recipe, "")
    for name, section in sections.items():
        if arguments in ([], [name]):
            rows += _rows(section, f"{name}.")
    print("\n".join(lines(rows)))


def _rows(section: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for f in dataclasses.fields(section):
        if not dataclasses.is_dataclass(f.type):
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            yield prefix + f.name, as_typed(default), _range(f.metadata), f.metadata["help"]


def as_typed(value: Any) -> str:
    """The value as written on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    return str(value) if isinstance(value, str) else json.dumps(value)


def _range(metadata: Any) -> str:
    names = metadata["registry"].entries if metadata["registry"] else metadata["choices"] or ()
    parts, low, high = [*names, *metadata["words"]], metadata["low"], metadata["high"]
    if low is not None:
        parts.append(f"{low:g} or more" if high is None else f"{low:g} to {high:g}")
    return ", ".join(parts)
