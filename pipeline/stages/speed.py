"""The speed stage: the last model of the run and its compact folder in, what each costs on this machine out."""

from pathlib import Path

from pipeline.runtime import files, processes
from pipeline.settings.schema import Recipe
from pipeline.speed.measure import measure
from pipeline.stages.export import last_model


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `results.json` (see `measure`) of the models "ordinary" and "compact". A finished stage keeps the figures of the
    machine that measured them, wherever the run is resumed."""
    if processes.is_main():
        folders = {"ordinary": last_model(inputs), "compact": inputs["export"] / "compact"}
        found = measure(folders, recipe.speed, recipe.trust_remote_code)
        files.write_json(folder / "results.json", found)
        for note in found["notes"]:
            processes.say(f"  {note}")
