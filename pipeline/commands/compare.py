"""`python launch.py compare RUN_FOLDER ... [out=FOLDER]`: a table and plots of several runs."""

from pathlib import Path

from pipeline.reporting.compare import compare
from pipeline.runtime.errors import UserError


def main(arguments: list[str]) -> None:
    folders = [Path(argument).expanduser() for argument in arguments if not argument.startswith("out=")]
    if not folders:
        raise UserError("nothing to compare: run launch.py compare runs/a runs/b ..., or compare FOLDER_OF_RUNS")
    out = [argument.removeprefix("out=") for argument in arguments if argument.startswith("out=")]
    compare(folders, Path(out[-1]).expanduser() if out else folders[0] if len(folders) == 1 else folders[0].parent)
