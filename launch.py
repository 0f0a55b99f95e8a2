"""The one command: `accelerate launch launch.py recipe=NAME [key=value ...]`, or `python launch.py COMMAND ...`."""

import importlib
import os
import sys

from pipeline.runtime import signals
from pipeline.runtime.errors import ReportedByPeer, Stopped, UserError, one_line
from pipeline.settings import reader
from pipeline.stages import sweep

# each is a module of pipeline.commands with main(arguments); all else runs a recipe
COMMANDS = ("compare", "verify", "apply", "export", "expand")


def main() -> int:
    """The exit code: 0 done, 2 a mistake or a fault that one line tells of, 75 stopped by a signal."""
    debug = "debug=true" in sys.argv
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"  # one process a machine speaks, until they are joined
    try:
        with signals.listening():
            if sys.argv[1:2] and sys.argv[1] in COMMANDS:
                importlib.import_module(f"pipeline.commands.{sys.argv[1]}").main(sys.argv[2:])
                return 0
            cells = sweep.cells(sys.argv[1:])
            if len(cells) > 1:
                return sweep.run(cells, main)
            settings = reader.load(sys.argv[1:])
            from pipeline.stages import runner  # torch and its friends load only once the recipe is sound

            quiet = False
            runner.run(settings)
    except ReportedByPeer as elsewhere:
        return elsewhere.code
    except Stopped as stopped:
        return _say(f"{stopped}: the same command goes on here", signals.EXIT_CODE, quiet)
    except (UserError, OSError) as error:  # OSError: a file that cannot be read, or be written but by `files.whole`
        if debug:
            raise
        return _say(str(error), 2, quiet)
    except Exception as error:
        if debug:
            raise
        return _say(f"{type(error).__name__}: {error} (a fault of Espalier: debug=true shows the traceback)", 2, quiet)
    return 0


def _say(text: str, code: int, quiet: bool) -> int:
    if not quiet:
        print(f"espalier: {one_line(text)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
