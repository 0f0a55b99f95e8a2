"""The prune stage: dense model and calibration text in, pruned model and masks out."""

from pathlib import Path

import torch
from torch import Tensor

from callbacks.layer_writer import LayerWriter
from callbacks.methods import pruner
from callbacks.outliers import OutlierShares
from pipeline import calibration, card, files, memory, models, processes
from pipeline.allocation import allocate
from pipeline.decoder import Decoder
from pipeline.masks import Masks
from pipeline.recipe import Recipe
from pipeline.walk import LayerWalk, tour, write_outside, write_rows


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/`, `masks.safetensors`, `layers.csv` and `matrices.csv`."""
    origin = models.dense_folder(recipe, inputs)
    decoder = Decoder(models.load(origin, recipe))
    settings = recipe.prune
    allocate(decoder, settings)  # refuses what cannot hold before any text is read
    batches = calibration.batches(recipe, recipe.calibration, "calibration", origin, decoder)
    store = calibration.plan_memory(decoder, batches, settings.hidden_states)
    shares = None
    if settings.allocation == "owl":
        shares = outlier_shares(Decoder(models.load(origin, recipe)), batches, store, recipe, folder)
    walk = LayerWalk(decoder, batches, folder, store)
    if walk.finished_before:
        processes.say(
            f"  {len(walk.finished_before)} of {len(decoder.layers)} layers were pruned before: passed through"
        )
    tour(walk, [pruner(settings, allocate(decoder, settings, shares)), LayerWriter(folder)])
    processes.say(f"  memory: at most {memory.text(memory.peak_gib(processes.device()))}")
    if processes.is_main():
        finish(walk, origin, recipe)


def outlier_shares(
    decoder: Decoder, batches: list[Tensor], store: torch.device, recipe: Recipe, folder: Path
) -> list[float]:
    """The shares for OWL by layer, from a walk through the dense model; kept in `owl.json` for a resumed run."""
    path = folder / "owl.json"
    before = processes.from_main(files.read_json(path))
    if before is not None:
        return before["outlier_shares"]
    measure = OutlierShares(recipe.prune.owl_outliers)
    tour(LayerWalk(decoder, batches, None, store), [measure])
    if processes.is_main():
        files.write_json(path, {"outlier_shares": measure.shares})
    return measure.shares


def finish(walk: LayerWalk, origin: Path, recipe: Recipe) -> None:
    """The rest of the model folder, all masks in one file, all rows in one table."""
    write_outside(walk, origin, recipe.dtype)
    parts = [walk.masks_file(index) for index in range(len(walk.decoder.layers))]
    rows = Masks.merge(parts, walk.folder / "masks.safetensors")
    matrices = [matrix for row in rows for matrix in row.pop("matrices")]
    write_rows(walk.folder / "layers.csv", rows)
    write_rows(walk.folder / "matrices.csv", matrices)
    card.write_model_card(walk.folder / "model", recipe, "prune")
