"""The report stage: what the other stages left on disk in, report.html and report.md out."""

from pathlib import Path

from pipeline.reporting import report
from pipeline.runtime import processes
from pipeline.settings.schema import Recipe


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `report.html` and `report.md`."""
    if processes.is_main():
        report.write(recipe, folder, inputs)
