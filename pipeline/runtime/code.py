"""The fingerprint of the project's code that decides a stage's outcome, so that a stage runs again after its code is edited.

The code of a stage is the file with its `run` and all files that it imports, directly or not. Modules that are loaded by
name, as registries do, must be passed as well. Comments, docstrings, layout and the packages `EXCLUDED` do not count.
"""

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pipeline.runtime import files

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "callbacks")
# these decide no result; the values of the settings are in a stage's key
EXCLUDED = ("pipeline/runtime", "pipeline/settings", "pipeline/registry")
DEFINITIONS = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def fingerprint(*modules: str, without: tuple[str, ...] = ()) -> dict[str, str]:
    """A hash by package (`pipeline/pruning`) of its files that the dotted `modules` use; the packages `without` are skipped.

    A used package's other files (tables, templates, kernels) all count.
    """
    packages: dict[Path, dict[str, str]] = defaultdict(dict)
    for path, text in used(*modules, without=without).items():
        packages[path.parent][path.name] = text
    return {
        str(folder.relative_to(ROOT)): files.digest([texts, files.fingerprint(_data(folder))])
        for folder, texts in sorted(packages.items())
    }


def used(*modules: str, without: tuple[str, ...] = ()) -> dict[Path, str]:
    """The code of the dotted `modules` and of all that they use, by file."""
    excluded = (*EXCLUDED, *without)
    code_by_path: dict[Path, str] = {}
    queue = list(modules)
    while queue:
        path = _path(queue.pop())
        if path is None or path in code_by_path or str(path.parent.relative_to(ROOT)) in excluded:
            continue
        code_by_path[path], imports = _read(path, path.stat().st_mtime_ns)
        queue.extend(imports)
    return code_by_path


def _path(module: str) -> Path | None:
    """The file of a module; None if it is not the project's."""
    if module.partition(".")[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _data(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc"))


@functools.lru_cache(None)
def _read(path: Path, changed_ns: int) -> tuple[str, tuple[str, ...]]:
    """The code of a file without comments and docstrings, and all modules that it may import."""
    tree, imports = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        elif isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return ast.unparse(tree), tuple(imports)  # `dump` differs more between Python versions
