"""The one command: `accelerate launch launch.py recipe=NAME [key=value ...]`, or `python launch.py COMMAND ...`."""

import importlib
import os
import sys

from pipeline import recipe, sweep
from pipeline.errors import UserError

COMMANDS = ("compare", "verify", "apply")  # each is a module of pipeline with main(arguments); all else runs a recipe


def main() -> int:
    debug = "debug=true" in sys.argv
    try:
        if sys.argv[1:2] and sys.argv[1] in COMMANDS:
            importlib.import_module(f"pipeline.{sys.argv[1]}").main(sys.argv[2:])
            return 0
        cells = sweep.cells(sys.argv[1:])
        if len(cells) > 1:
            return sweep.run(cells, main)
        settings = recipe.load(sys.argv[1:])
        from pipeline import stages  # torch and its friends load only once the recipe is sound

        stages.run(settings)
    except (UserError, OSError) as error:  # OSError: a file that cannot be read, or be written but by `files.whole`
        if debug:
            raise
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OSError):  # which one process alone may meet
            print(f"espalier: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if debug or "Connection closed by peer" not in str(error):
            raise
        print("espalier: another process ended, and says why", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
