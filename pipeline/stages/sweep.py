"""Owns a sweep: several settings from one command, each combination an ordinary run in a folder of its own.

    launch.py prune.method=magnitude,wanda prune.sparsity=0.5,2of4

makes four runs. What their stages have in common is done once (`stages` takes over what another cell has finished).
A cell runs in a process forked from this one, which has loaded the libraries and used none: it costs no imports, its memory
goes with it, and whatever ends it, the other cells run.
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
NAMELESS = ("recipe", "model", "prune.method", "prune.sparsity")  # whose values speak for themselves


def cells(arguments: list[str]) -> dict[str, list[str]]:
    """The arguments of each run, by its name: the product of all values of all keys, the last key's changing fastest.

    One cell without a name where no key has several values. A comma inside brackets, braces or quotes separates none.
    """
    given = [argument.partition("=")[::2] for argument in arguments]
    swept = {key: options(value) for key, value in given if len(options(value)) > 1}
    if not swept:
        return {"": arguments}
    for key, values in swept.items():
        _check(key, values)
    fixed = [argument for argument in arguments if argument.partition("=")[0] not in swept]
    folder = _folder([*fixed, *(f"{key}={values[0]}" for key, values in swept.items())], swept.get("recipe"))
    found = {}
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        name = "_".join(_name(key, value, swept[key]) for key, value in chosen.items())
        if name in found:
            raise UserError(f"two cells of the sweep are called {name}: is a value given twice?")
        found[name] = [
            *fixed,
            *(f"{key}={value}" for key, value in chosen.items()),
            f"run_dir={_quoted(str(folder / name))}",
        ]
    return found


def options(text: str) -> list[str]:
    """`a,[b,c],"d,e"` -> a; [b,c]; "d,e"."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if sign == "," and not depth and not quote:
            parts.append("")
            continue
        if quote or sign in QUOTES:
            quote = "" if sign == quote else quote or sign
        else:
            depth += (sign in OPEN) - (sign in CLOSED)
        parts[-1] += sign
    return parts


def run(cells: dict[str, list[str]], main: Callable[[], int]) -> int:
    """Runs all cells, one after the other, and compares them; returns the exit code.

    `main` is the command itself, which reads `sys.argv`. Each process of a launch walks the cells in this order.
    """
    # a mistake in any is answered before all work
    settings = [reader.load(arguments) for arguments in cells.values()]
    from pipeline.runtime import processes  # what all cells need is loaded before they part
    from pipeline.stages import runner  # noqa: F401  # what all cells need is loaded before they part

    failed = []
    for number, (name, arguments) in enumerate(cells.items(), 1):
        _say(f"[{number}/{len(cells)}] {name}")
        os.environ[processes.CELL] = name
        if _in_a_process_of_its_own(main, arguments):
            failed.append(name)
            _say(f"espalier: {name} failed; the other cells run", sys.stderr)
    finished = [Path(cell.run_dir) for name, cell in zip(cells, settings) if name not in failed]
    if finished and all("evaluate" in cell.stages for cell in settings) and _is_main():
        from pipeline.reporting.compare import compare

        compare(finished, Path(settings[0].run_dir).parent)
    if failed:
        _say(f"espalier: {len(failed)} of {len(cells)} cells failed: {', '.join(failed)}", sys.stderr)
    return FAILED if failed else 0


def _in_a_process_of_its_own(main: Callable[[], int], arguments: list[str]) -> int:
    parent = os.getpid()

    def work() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: else a killed sweep's cell would work on
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
        raise UserError(
            f"{key} holds for the whole sweep: give it one value (in quotes, where the comma belongs to it)"
        )
    if "" in values:
        raise UserError(f"{key}={','.join(values)}: a value is missing beside a comma")
    if isinstance(default, list) and not all(value.startswith("[") for value in values):
        raise UserError(f"{key} is a list: set '{key}=[{','.join(values)}]'")


def _folder(first: list[str], recipes: list[str] | None) -> Path:
    """Of the whole sweep, from the first cell's arguments: its run folder, or one named by all recipes."""
    if recipes and not any(argument.startswith("run_dir=") for argument in first):
        return Path("runs") / "-".join(Path(name).stem for name in recipes)
    return Path(reader.load(first).run_dir)


def _quoted(path: str) -> str:
    """A cell reads its arguments as any run does, and a comma in the folder's name is no sweep there either."""
    quote = '"' if "'" in path else "'"
    return f"{quote}{path}{quote}" if "," in path else path


def _name(key: str, value: str, values: list[str]) -> str:
    """A value as part of a folder's name; a path by its end, where that tells it from the others."""
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
