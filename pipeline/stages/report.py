"""The report stage: writes a report from the files of the other stages."""

from pathlib import Path

from pipeline.reporting import report
from pipeline.runtime import processes
from pipeline.settings.schema import Recipe


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `report.html` and `report.md`."""
    if processes.is_main():
        report.write(recipe, folder, inputs)
