"""The one command: `accelerate launch launch.py recipe=NAME [key=value ...]`, or `python launch.py COMMAND ...`."""

from pipeline.commands.main import leave, main

if __name__ == "__main__":
    leave(main())
