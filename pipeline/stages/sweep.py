"""A sweep: one command with several values for some keys. Each combination, a cell, is an ordinary run in its own folder.

    launch.py prune.method=magnitude,wanda prune.sparsity=0.5,2of4

makes four runs. Stages that cells have in common run once (stages/siblings.py). Each cell runs in a process forked from this
one after the imports: it starts at once, its memory is freed when it ends, and its failure does not stop the other cells.
"""

import ctypes
import itertools
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.runtime.errors import UserError
from pipeline.settings import reader, schema

FAILED = 2  # the exit code
OPEN, CLOSED, QUOTES = "[{(", "]})", "'\""
NAMELESS = ("recipe", "model", "prune.method", "prune.sparsity")  # in a cell's name, these are values without their key


def cells(arguments: list[str]) -> dict[str, list[str]]:
    """The arguments of each cell, by its name: the product of all values of all keys, the last key's changing fastest.

    Without a key of several values, one cell named "". A comma inside brackets, braces or quotes does not separate values.
    """
    pairs = [argument.partition("=")[::2] for argument in arguments]
    last = dict(pairs)  # of a key's settings the last, as in a run
    swept = {key: options(value) for key, value in pairs if value == last[key] and len(options(value)) > 1}
    if not swept:
        return {"": arguments}
    for key, values in swept.items():
        _check(key, values)
    fixed = [argument for argument in arguments if argument.partition("=")[0] not in swept]
    folder = _folder([*fixed, *(f"{key}={values[0]}" for key, values in swept.items())], swept.get("recipe"))
    by_name = {}
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        name = "_".join(_name(key, value, swept[key]) for key, value in chosen.items())
        if name in by_name:
            raise UserError(f"two cells of the sweep are called {name}: is a value given twice?")
        by_name[name] = [
            *fixed,
            *(f"{key}={value}" for key, value in chosen.items()),
            f"run_dir={_quoted(str(folder / name))}",
        ]
    return by_name


def options(text: str) -> list[str]:
    """`a,[b,c],"d,e"` -> a; [b,c]; "d,e"."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if character == "," and not depth and not quote:
            values.append("")
            continue
        if quote or character in QUOTES:
            quote = "" if character == quote else quote or character
        else:
            depth += (character in OPEN) - (character in CLOSED)
        values[-1] += character
    return values


def run(cells: dict[str, list[str]], main: Callable[[], int]) -> int:
    """Runs all cells, one after the other, and compares them; returns the exit code.

    `main` is the command itself, which reads `sys.argv`. Each process of a launch runs the cells in this order.
    """
    settings = [reader.load(arguments) for arguments in cells.values()]  # raises for a mistake in any cell
    # imported once, before the forks
    from pipeline.runtime import processes
    from pipeline.stages import runner  # noqa: F401

    failed = []
    for number, (name, arguments) in enumerate(cells.items(), 1):
        _say(f"[{number}/{len(cells)}] {name}")
        os.environ[processes.CELL] = name
        if _run_in_fork(main, arguments):
            failed.append(name)
            _say(f"espalier: {name} failed; the other cells continue", sys.stderr)
    finished = [Path(cell.run_dir) for name, cell in zip(cells, settings) if name not in failed]
    if finished and all("evaluate" in cell.stages for cell in settings) and _is_main():
        from pipeline.reporting.compare import compare

        try:
            compare(finished, Path(settings[0].run_dir).parent)
        except UserError as error:  # the runs are finished all the same
            _say(f"no comparison: {error}")
    if failed:
        _say(f"espalier: {len(failed)} of {len(cells)} cells failed: {', '.join(failed)}", sys.stderr)
    return FAILED if failed else 0


def _run_in_fork(main: Callable[[], int], arguments: list[str]) -> int:
    parent = os.getpid()

    def work() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the cell ends if the sweep is killed
            if os.getppid() != parent:
                os._exit(FAILED)
        sys.argv = [sys.argv[0], *arguments]
        sys.exit(main())

    sys.stdout.flush()
    cell = multiprocessing.get_context("fork").Process(target=work)
    cell.start()
    try:
        cell.join()
    except BaseException:  # a signal that stops the sweep
        cell.terminate()
        cell.join()
        raise
    return cell.exitcode


def _check(key: str, values: list[str]) -> None:
    default = schema.plain(schema.Recipe())
    for part in key.split("."):
        default = default.get(part) if isinstance(default, dict) else None
    if key in ("run_dir", "debug"):
        raise UserError(f"{key} holds for the whole sweep: set one value, in quotes if the comma is part of it")
    if "" in values:
        raise UserError(f"{key}={','.join(values)}: a value is missing before or after a comma")
    if isinstance(default, list) and not all(value.startswith("[") for value in values):
        raise UserError(f"{key} is a list: set '{key}=[{','.join(values)}]'")


def _folder(first: list[str], recipes: list[str] | None) -> Path:
    """The folder of the sweep, from the first cell's arguments: its run folder, or one named after all recipes."""
    if recipes and not any(argument.startswith("run_dir=") for argument in first):
        return Path("runs") / "-".join(Path(name).stem for name in recipes)
    return Path(reader.load(first).run_dir)


def _quoted(path: str) -> str:
    """Quotes a path with a comma, so that the cell does not read it as a sweep."""
    quote = '"' if "'" in path else "'"
    return f"{quote}{path}{quote}" if "," in path else path


def _name(key: str, value: str, values: list[str]) -> str:
    """A value as part of a folder's name; of a path only its last part, if that is unique among the values."""
    ends = [Path(other).stem if other.endswith((".py", ".yaml")) else Path(other).name for other in values]
    text = ends[values.index(value)] if len(set(ends)) == len(ends) else value
    text = re.sub(r"^(\d+):(\d+)$", r"\1of\2", text)
    text = re.sub(r"[^\w.+=-]+", "-", text).strip("-")
    return text if key in NAMELESS else f"{key.rpartition('.')[2]}={text}"


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str, stream=None) -> None:
    if _is_main():
        print(text, file=stream or sys.stdout, flush=True)
