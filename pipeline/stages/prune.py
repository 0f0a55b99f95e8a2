"""The prune stage: dense model and calibration text in, pruned model and masks out."""

from pathlib import Path

import torch
from torch import Tensor, nn

from callbacks.layer_writer import LayerWriter
from callbacks.methods import pruner
from callbacks.outliers import OutlierShares
from callbacks.stop_at_signal import StopAtSignal
from pipeline.engine.block_files import write_rows
from pipeline.engine.blocks import find_blocks
from pipeline.engine.coverage import Coverage
from pipeline.engine.matrices import entries
from pipeline.engine.walk import LayerWalk, run_layerwise
from pipeline.models import loading
from pipeline.pruning import calibration
from pipeline.pruning.allocation import allocate
from pipeline.reporting import card
from pipeline.runtime import files, memory, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Prune, Recipe
from pipeline.sparsity.masks import Masks

NOTHING = "nothing was pruned: the model calls none of the matrices of its layers with calibration text"


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/`, `masks.safetensors`, `layers.csv`, `matrices.csv` and `coverage.csv`."""
    origin = loading.dense_folder(recipe, inputs)
    model = loading.load(origin, recipe)
    settings, blocks = recipe.prune, find_blocks(model)
    patterns = allocate(blocks, settings)  # refuses what cannot hold before any text is read
    coverage = Coverage(entries(model, blocks), patterns.keys())
    for what, text in coverage.told(patterns):
        processes.say(f"  {what}: {text}")
    batches = calibration.batches(recipe, recipe.calibration, "calibration", origin, model)
    store = calibration.plan_memory(model, batches, settings.hidden_states)
    if settings.allocation == "owl":
        shares = outlier_shares(loading.load(origin, recipe), batches, store, recipe, folder)
        patterns = allocate(blocks, settings, shares)
    walk = LayerWalk(model, batches, store, folder)
    if done := walk.files.finished_before:
        processes.say(f"  {len(done)} of {len(blocks)} layers were pruned before: passed through")
    run_layerwise(walk, [pruner(settings, patterns), LayerWriter(), StopAtSignal()])
    processes.say(f"  memory: at most {memory.text(memory.peak_gib(processes.device()))}")
    if processes.is_main():
        finish(walk, origin, recipe, coverage)


def in_memory(model: nn.Module, batches: list[Tensor], settings: Prune) -> Masks:
    """Prunes the model itself, on the device where it is; its masks. `batches` are tokens, each (batch_size, seq_len)."""
    blocks = find_blocks(model)
    patterns = allocate(blocks, settings)
    store = calibration.plan_memory(model, batches, settings.hidden_states)
    if settings.allocation == "owl":
        measure = OutlierShares(settings.owl_outliers)
        run_layerwise(LayerWalk(model, batches, store), [measure])
        patterns = allocate(blocks, settings, measure.shares)
    walk = LayerWalk(model, batches, store, in_memory=True)
    run_layerwise(walk, [pruner(settings, patterns), LayerWriter()])
    if not walk.files.masks:
        raise UserError(NOTHING)
    return walk.files.masks


def outlier_shares(
    model: nn.Module, batches: list[Tensor], store: torch.device, recipe: Recipe, folder: Path
) -> dict[int, float]:
    """The shares for OWL by block, from a walk through the dense model; kept in `owl.json` for a resumed run."""
    path = folder / "owl.json"
    before = processes.from_main(files.read_json(path))
    if before is not None:
        return {int(index): share for index, share in before["outlier_shares"].items()}
    measure = OutlierShares(recipe.prune.owl_outliers)
    run_layerwise(LayerWalk(model, batches, store), [measure, StopAtSignal()])
    if processes.is_main():
        files.write_json(path, {"outlier_shares": measure.shares})
    return measure.shares


def finish(walk: LayerWalk, origin: Path, recipe: Recipe, coverage: Coverage) -> None:
    """The rest of the model folder, all masks in one file, all rows in one table."""
    folder = walk.files.folder
    rows = Masks.merge(walk.files.masks_files(), folder / "masks.safetensors")
    matrices = [matrix for row in rows for matrix in row.pop("matrices")]
    if not matrices:
        raise UserError(NOTHING)
    walk.files.write_rest(origin, recipe.dtype)
    write_rows(folder / "coverage.csv", coverage.rows({row["matrix"] for row in matrices}))
    write_rows(folder / "layers.csv", rows)
    write_rows(folder / "matrices.csv", matrices)
    card.write_model_card(folder / "model", recipe, "prune")
