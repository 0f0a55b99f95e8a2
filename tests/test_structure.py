"""Imports go one way: each part of the pipeline stands on those before it, and only the stages use the callbacks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    *("runtime", "sparsity", "settings", "models", "data", "engine", "pruning", "recovery", "evaluation", "compact"),
    *("callbacks", "reporting", "stages", "api", "commands"),
)
FILES = sorted([*ROOT.glob("pipeline/*/*.py"), *ROOT.glob("callbacks/*.py")])


def imported(path: Path) -> Iterator[str]:
    """The dotted names of the project's own modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def part_of(name: str) -> str | None:
    first, *rest = name.split(".")
    return first if first == "callbacks" else rest[0] if first == "pipeline" and rest else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    parts = {part for name in imported(path) if (part := part_of(name))}
    later = {part for part in parts if ORDER.index(part) > ORDER.index(own)}
    assert not later, f"{own} imports {sorted(later)}, which stand on it"
    if "callbacks" in parts:
        assert own in ("callbacks", "stages")


def test_every_part_is_in_the_order():
    assert {path.parent.name for path in FILES} == set(ORDER)
