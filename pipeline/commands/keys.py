"""`espalier keys [SECTION]`: all settings of recipes, with default, range and meaning. Imports no torch."""

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
        raise UserError(f"keys takes one section, {len(arguments)} were given: {', '.join(sections)}")
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
    """As it is written on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    return str(value) if isinstance(value, str) else json.dumps(value)


def _range(about: Any) -> str:
    named = about["registry"].entries if about["registry"] else about["choices"] or ()
    parts = [*named, *about["words"]]
    if about["low"] is not None:
        parts.append(
            f"{about['low']:g} to {about['high']:g}" if about["high"] is not None else f"{about['low']:g} or more"
        )
    return ", ".join(parts)
