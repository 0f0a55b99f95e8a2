"""Owns the fingerprint of the project's own code that decides what a stage writes, so that edited maths runs again.

The code of a stage is the file that has its `run` and all that this imports, file by file. What is loaded by a name, as
registries do, must be given beside it. Comments, docstrings and layout do not count, nor do the packages of `CARRIERS`.
"""

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pipeline.runtime import files

ROOT = Path(__file__).resolve().parents[2]
OWN = ("pipeline", "callbacks")
# they move, name and say things; the values of the settings are in a stage's key
CARRIERS = ("pipeline/runtime", "pipeline/settings", "pipeline/registry")
DEFINITIONS = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def fingerprint(*modules: str, without: tuple[str, ...] = ()) -> dict[str, str]:
    """By package (`pipeline/pruning`), a hash of its files that the dotted `modules` use; none of the packages `without`.

    Of a package that is used, the files that are not Python count whole (tables, templates, kernels).
    """
    packages: dict[Path, dict[str, str]] = defaultdict(dict)
    for path, text in used(*modules, without=without).items():
        packages[path.parent][path.name] = text
    return {
        str(folder.relative_to(ROOT)): files.digest([texts, files.fingerprint(_data(folder))])
        for folder, texts in sorted(packages.items())
    }


def used(*modules: str, without: tuple[str, ...] = ()) -> dict[Path, str]:
    """The files that the dotted `modules` use, themselves included, and the code of each."""
    ignored = (*CARRIERS, *without)
    found: dict[Path, str] = {}
    waiting = list(modules)
    while waiting:
        path = _path(waiting.pop())
        if path is None or path in found or str(path.parent.relative_to(ROOT)) in ignored:
            continue
        found[path], imports = _read(path, path.stat().st_mtime_ns)
        waiting.extend(imports)
    return found


def _path(module: str) -> Path | None:
    """The file of one of the project's modules."""
    if module.partition(".")[0] not in OWN:
        return None
    path = ROOT.joinpath(*module.split("."))
    return next((it for it in (path.with_suffix(".py"), path / "__init__.py") if it.is_file()), None)


def _data(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc"))


@functools.lru_cache(None)
def _read(path: Path, changed_ns: int) -> tuple[str, tuple[str, ...]]:
    """The code of a file without comments and docstrings, and the modules that it may import, wherever in it."""
    tree, imports = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        elif isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return ast.unparse(tree), tuple(imports)  # unparse differs less between versions of Python than dump
