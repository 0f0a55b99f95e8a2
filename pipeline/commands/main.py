"""The entry point of `launch.py` and of the console command `espalier`: starts a run, a sweep or another command."""

import ast
import atexit
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pipeline.runtime import signals
from pipeline.runtime.errors import ReportedByPeer, Stopped, UserError, one_line, unexpected
from pipeline.runtime.versions import version_of, versions
from pipeline.settings import reader
from pipeline.stages import sweep

# modules of this package with main(arguments); anything else on the command line runs a recipe
COMMANDS = {
    "plan": "[recipe=NAME] [key=value ...]    what a run would do; writes nothing",
    "recipes": "                                 a table of the recipes",
    "keys": "[SECTION]                        all settings: default, range, meaning",
    "compare": "RUN ... [out=FOLDER]             one table and one plot of several runs",
    "verify": "MODEL MASKS                      checks a model folder against a mask file",
    "apply": "MODEL MASKS TARGET               writes a copy of a model with the pruned weights set to zero",
    "export": "MODEL MASKS TARGET [values=int8] writes a pruned model as a compact folder",
    "expand": "COMPACT TARGET                   writes a compact folder as an ordinary model folder",
    "speed": "FOLDER ... [speed.KEY=VALUE ...] load time, memory and tokens/s of models, ordinary or compact",
}
SEVERAL = os.environ.get("WORLD_SIZE", "1") != "1"  # Lightning may delete the variable later
HELP = f"""Prunes a language model and recovers it by fine-tuning, in one resumable command.

  espalier [recipe=NAME] [key=value ...]           runs a recipe (tiny, if none is named)
  accelerate launch launch.py recipe=NAME ...      the same on several GPUs, from a checkout
  accelerate launch -m pipeline.commands.main ...  the same where it is installed

A value with a comma makes a sweep: prune.method=wanda,sparsegpt. The same command resumes a run.

Commands, as `espalier COMMAND` or `python launch.py COMMAND`:
{chr(10).join(f"  {name:8} {description}" for name, description in COMMANDS.items())}

Options: --help, --version; debug=true shows tracebacks; trust_remote_code=true runs the code that a model folder holds.
"""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 an error, reported in one line, 75 stopped by a signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which ends the import of matplotlib where its package is missing
    debug = "debug=true" in arguments
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"  # until the processes are joined, one per machine prints
    try:
        with signals.listening():
            if command := _command(arguments):
                command()
                return 0
            cells = sweep.cells(arguments)
            if len(cells) > 1:
                return sweep.run(cells, main)
            settings = reader.load(arguments)
            from pipeline.stages import runner  # imports torch, so only once the recipe is valid

            quiet = False
            runner.run(settings)
    except ReportedByPeer as error:
        return error.code
    except Stopped as stopped:
        return _fail(f"{stopped}: run the same command again to resume", signals.EXIT_CODE, quiet)
    except BrokenPipeError:  # the reader of our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:  # OSError: a file that cannot be read, or written without `atomic_write`
        if debug:
            raise
        return _fail(str(error), 2, quiet)
    except Exception as error:
        if debug:
            raise
        return _fail(unexpected(error), 2, quiet)
    return 0


def run_and_leave() -> NoReturn:
    leave(main())


def leave(code: int) -> NoReturn:
    """Ends the process with this code.

    One of several processes does not return to the interpreter, which on its way out destroys objects that threads of torch
    still use: rarely they then abort a process whose work is done ("terminate called without an active exception",
    pytorch#38228).
    """
    if not SEVERAL:
        sys.exit(code)  # profilers write their results after it
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # the reader of our output has ended, as `head` does
        pass
    except OSError:  # the end of the output is lost
        code = code or 2
    os._exit(code)


def _command(arguments: list[str]) -> Callable[[], None] | None:
    """The command or option on the command line; None for a run. Raises `UserError` for an unknown word."""
    first, *rest = arguments or [""]
    rest = [argument for argument in rest if argument != "debug=true"]  # `main` has read it
    command = first if first in COMMANDS else None
    if {"-h", "--help"} & set(arguments):
        return lambda: print(_command_help(command) if command else HELP)
    if first == "--version":
        return lambda: print(_versions())
    if command:
        return lambda: importlib.import_module(f"pipeline.commands.{command}").main(rest)
    if first.startswith("-"):
        raise UserError(f"unknown option '{first}': see --help; settings are written key=value")
    if first and "=" not in first:
        close = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"commands are {', '.join(COMMANDS)};"
        raise UserError(f"cannot read argument '{first}': {hint} settings are written key=value, such as recipe=tiny")
    return None


def _command_help(command: str) -> str:
    """The docstring of the command's module, without importing it: torch takes seconds."""
    path = importlib.util.find_spec(f"pipeline.commands.{command}").origin
    return ast.get_docstring(ast.parse(Path(path).read_text()))


def _versions() -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"espalier {version_of('espalier')} (Python {sys.version.split()[0]}, {libraries})"


def _fail(text: str, code: int, quiet: bool) -> int:
    if not quiet:
        print(f"espalier: {one_line(text)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    leave(main())
