"""What `launch.py` and the console command `espalier` do: the command line -> a run, a sweep, or one of the commands."""

import ast
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.runtime import signals
from pipeline.runtime.errors import ReportedByPeer, Stopped, UserError, one_line
from pipeline.settings import reader
from pipeline.stages import sweep

# each is a module of this package with main(arguments); all else runs a recipe
COMMANDS = {
    "plan": "[recipe=NAME] [key=value ...]    what a run would do; writes nothing",
    "recipes": "                                 the recipes that there are",
    "keys": "[SECTION]                        all settings: default, range, meaning",
    "compare": "RUN ... [out=FOLDER]             one table and one plot of several runs",
    "verify": "MODEL MASKS                      checks a model folder against a mask file",
    "apply": "MODEL MASKS TARGET               writes a model with its pruned weights at zero",
    "export": "MODEL MASKS TARGET [values=int8] writes a pruned model as a compact folder",
    "expand": "COMPACT TARGET                   writes the model that a compact folder holds",
}
HELP = f"""Prunes a language model and trains it back to health, in one resumable command.

  espalier [recipe=NAME] [key=value ...]           runs a recipe (tiny, if none is named)
  accelerate launch launch.py recipe=NAME ...      the same on several GPUs, from a checkout
  accelerate launch -m pipeline.commands.main ...  the same where it is installed

A value with a comma makes a sweep: prune.method=wanda,sparsegpt. The same command again does what is left.

Commands, as `espalier COMMAND` or `python launch.py COMMAND`:
{chr(10).join(f"  {name:8} {about}" for name, about in COMMANDS.items())}

Options: --help, --version; debug=true shows tracebacks.
"""
LIBRARIES = ("torch", "transformers", "lightning", "peft", "lm_eval")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 2 a mistake or a fault that one line tells of, 75 stopped by a signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "debug=true" in arguments
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"  # one process a machine speaks, until they are joined
    try:
        with signals.listening():
            if work := _without_a_run(arguments):
                work()
                return 0
            cells = sweep.cells(arguments)
            if len(cells) > 1:
                return sweep.run(cells, main)
            settings = reader.load(arguments)
            from pipeline.stages import runner  # torch and its friends load only once the recipe is sound

            quiet = False
            runner.run(settings)
    except ReportedByPeer as elsewhere:
        return elsewhere.code
    except Stopped as stopped:
        return _say(f"{stopped}: the same command goes on here", signals.EXIT_CODE, quiet)
    except BrokenPipeError:  # what reads our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (
        UserError,
        OSError,
    ) as error:  # OSError: a file that cannot be read, or be written but by `files.atomic_write`
        if debug:
            raise
        return _say(str(error), 2, quiet)
    except Exception as error:
        if debug:
            raise
        return _say(f"{type(error).__name__}: {error} (a fault of Espalier: debug=true shows the traceback)", 2, quiet)
    return 0


def _without_a_run(arguments: list[str]) -> Callable[[], None] | None:
    """What the first argument asks for, where that is no run; `UserError` for a word that is no command."""
    first, *rest = arguments or [""]
    command = first if first in COMMANDS else None
    if {"-h", "--help"} & set(arguments):
        return lambda: print(_about(command) if command else HELP)
    if first == "--version":
        return lambda: print(_versions())
    if command:
        return lambda: importlib.import_module(f"pipeline.commands.{command}").main(rest)
    if first.startswith("-"):
        raise UserError(f"unknown option '{first}': --help lists what there is; settings are written key=value")
    if first and "=" not in first:
        close = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"commands are {', '.join(COMMANDS)};"
        raise UserError(f"cannot read argument '{first}': {hint} settings are written key=value, such as recipe=tiny")
    return None


def _about(command: str) -> str:
    """The docstring of its module, which is not imported: torch takes seconds."""
    path = importlib.util.find_spec(f"pipeline.commands.{command}").origin
    return ast.get_docstring(ast.parse(Path(path).read_text()))


def _versions() -> str:
    found = {}
    for name in ("espalier", *LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    own = found.pop("espalier")
    return f"espalier {own} (Python {sys.version.split()[0]}, {', '.join(f'{n} {v}' for n, v in found.items())})"


def _say(text: str, code: int, quiet: bool) -> int:
    if not quiet:
        print(f"espalier: {one_line(text)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
