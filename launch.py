"""The one command: `accelerate launch launch.py recipe=NAME [key=value ...]`, or `python launch.py COMMAND ...`."""

import sys

from pipeline.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
