"""The speed stage: measures the last model of the run and its compact folder on this machine."""

from pathlib import Path

from pipeline.runtime import files, processes
from pipeline.settings.schema import Recipe
from pipeline.speed.measure import measure
from pipeline.stages.export import last_model


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `results.json`: the result of `measure` for the models "ordinary" and "compact". A finished stage keeps its
    figures even if the run is resumed on another machine."""
    if processes.is_main():
        folders = {"ordinary": last_model(inputs), "compact": inputs["export"] / "compact"}
        results = measure(folders, recipe.speed, recipe.trust_remote_code)
        files.write_json(folder / "results.json", results)
        for note in results["notes"]:
            processes.say(f"  {note}")
