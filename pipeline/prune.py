"""The prune stage: dense model and calibration text in, pruned model and masks out."""

import csv
import shutil
from pathlib import Path

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.layer_writer import LayerWriter
from callbacks.methods import pruner
from callbacks.outliers import OutlierShares
from callbacks.stop_at_signal import StopAtSignal
from pipeline import data, files, memory, models, processes, sources
from pipeline.allocation import allocate
from pipeline.decoder import Decoder
from pipeline.errors import UserError
from pipeline.masks import Masks
from pipeline.recipe import Recipe
from pipeline.walk import LayerWalk


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/`, `masks.safetensors` and `layers.csv`."""
    origin = models.dense_folder(recipe, inputs)
    decoder = Decoder(models.load(origin, recipe))
    settings = recipe.prune
    allocate(decoder, settings)  # refuses what cannot hold before any text is read
    batches = calibration_batches(recipe, origin, decoder)
    store = plan_memory(decoder, batches, settings.hidden_states)
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


def calibration_batches(recipe: Recipe, origin: Path, decoder: Decoder) -> list[Tensor]:
    """This rank's batches of calibration tokens, each (batch_size, seq_len)."""
    settings, config = recipe.calibration, decoder.model.config
    models.check_length(config, "calibration.seq_len", settings.seq_len)
    source = sources.source(settings.dataset, recipe.mirror, settings.split, settings.config)
    tokenizer = models.tokenizer(origin, recipe)
    windows_NT = data.calibration(source, tokenizer, settings.samples, settings.seq_len, recipe.seed)
    models.check_vocabulary(config, windows_NT, source)
    # batches are cut before they are shared out: a batch is computed the same on any number of processes
    batches = windows_NT.split(settings.batch_size)
    if len(batches) < processes.world_size():
        raise UserError(
            f"{len(batches)} batches of calibration samples cannot be shared by {processes.world_size()} processes: "
            f"type calibration.samples={settings.batch_size * processes.world_size()} or more"
        )
    return list(batches[processes.rank() :: processes.world_size()])


def plan_memory(decoder: Decoder, batches: list[Tensor], where: str) -> torch.device:
    """Says what will be needed and what is free, and chooses where the hidden states wait between layers."""
    device = processes.device()
    layers = 2 * max(memory.size_gib(layer) for layer in decoder.layers)
    outside = memory.size_gib(decoder.model) - sum(memory.size_gib(layer) for layer in decoder.layers)
    width = decoder.model.config.get_text_config().hidden_size * decoder.model.dtype.itemsize
    hidden = sum(batch.numel() for batch in batches) * width / memory.GIB
    free = memory.free_gib(device)
    fits = layers + outside + 2 * hidden < 0.8 * free
    store = device if device.type == "cpu" or where == "gpu" or (where == "auto" and fits) else torch.device("cpu")
    processes.say(
        f"  memory: {memory.text(layers)} for two layers, {memory.text(outside)} outside the layers, {memory.text(hidden)} "
        f"of hidden states on the {'GPU' if store.type == 'cuda' else 'host'}; {memory.text(free)} free"
    )
    if layers + outside + (hidden if store == device else 0) > free:
        processes.say(
            "  memory: that may not fit: a smaller calibration.batch_size or fewer calibration.samples need less"
        )
    return store


def tour(walk: LayerWalk, callbacks: list[Callback]) -> None:
    """Walks all layers with the callbacks."""
    trainer = Trainer(
        callbacks=[*callbacks, StopAtSignal()],
        inference_mode=False,  # else the weights become inference tensors, and a later fit of them dies
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,  # each layer says a line, also off a terminal
        **processes.trainer_arguments(),
    )
    assert trainer.world_size == processes.world_size()
    trainer.predict(walk, DataLoader(walk.decoder.layers, batch_size=None), return_predictions=False)


def outlier_shares(decoder: Decoder, batches: list, store: torch.device, recipe: Recipe, folder: Path) -> list[float]:
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
    decoder, folder = walk.decoder, walk.folder
    in_layers = decoder.prefix + "."
    model = decoder.model
    once = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    state = model.state_dict()  # holds tied weights twice, which a file must not
    rest = {k: v.contiguous().cpu() for k, v in state.items() if k in once and not k.startswith(in_layers)}
    with files.whole(walk.shard(len(decoder.layers))) as beside:
        save_file(rest, beside, {"format": "pt"})
    models.write_index(folder / "model")
    models.copy_beside(origin, folder / "model", recipe.dtype)

    parts = [walk.masks_file(index) for index in range(len(decoder.layers))]
    rows = Masks.merge(parts, folder / "masks.safetensors")
    with files.whole(folder / "layers.csv") as beside, open(beside, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    shutil.rmtree(folder / "masks")
