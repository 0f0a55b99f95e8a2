"""The prune stage: a walk over the model's decoder layers in which a batch is a layer, and pruning is a callback."""

import contextlib
import csv
import shutil
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.layer_writer import LayerWriter
from callbacks.pruner import METHODS
from pipeline import data, files, models, patterns, processes
from pipeline.decoder import Decoder, matrices, weight_OI
from pipeline.errors import UserError
from pipeline.masks import Masks
from pipeline.recipe import Recipe
from pipeline.watch import EveryInputSeen, InputWatch


class LayerWalk(LightningModule):
    """Owns this rank's hidden states and carries them from layer to layer.

    A step forwards them through the layer just pruned, so that each layer sees what the pruned model will give it, and
    then shows them to the next layer, whose watched matrices decide what goes.
    """

    def __init__(self, decoder: Decoder, batches: list[Tensor], folder: Path) -> None:
        super().__init__()
        object.__setattr__(self, "decoder", decoder)  # out of _modules: Lightning must not move, wrap or save the model
        self.batches, self.folder = batches, folder
        self.tokens = sum(batch.numel() for batch in batches)
        self.hidden: list[Tensor] = []
        self.previous: nn.Module | None = None
        self.watch: InputWatch | None = None
        self.masks = Masks()  # of the layer at hand
        self.log_row: dict = {}
        self.finished_before = frozenset(i for i in range(len(decoder.layers)) if self.shard(i).exists())

    def is_finished(self, index: int) -> bool:
        return index in self.finished_before

    def shard(self, index: int) -> Path:
        count = len(self.decoder.layers) + 1
        return self.folder / "model" / f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def masks_file(self, index: int) -> Path:
        return self.folder / "masks" / f"{index:05d}.safetensors"

    def on_predict_start(self) -> None:
        place(self.decoder, self.device)
        self.hidden = [self.decoder.embed(batch.to(self.device)) for batch in self.batches]

    def predict_step(self, layer: nn.Module, index: int) -> None:
        if self.previous is not None:
            self.hidden = [self.decoder.run(index - 1, self.previous, hidden) for hidden in self.hidden]
            release(self.previous)
        self.masks = Masks()
        if self.is_finished(index):
            weights = load_file(self.shard(index), device=str(self.device))
            layer.load_state_dict(
                {k.removeprefix(f"{self.decoder.prefix}.{index}."): v for k, v in weights.items()}, assign=True
            )
        else:
            for hidden in self.hidden:
                self.watch.next_batch()
                with contextlib.suppress(EveryInputSeen):
                    self.decoder.run(index, layer, hidden)
        self.previous = layer


def place(decoder: Decoder, device: torch.device) -> None:
    """Moves what is not a decoder layer (embeddings, positions), and layer 0, which is called once to learn its output."""
    outside = {id(module) for layer in decoder.layers for module in layer.modules()}
    for module in decoder.model.modules():
        if id(module) not in outside:
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        tensor.data = tensor.data.to(device)
    decoder.layers[0].to(device)


def release(layer: nn.Module) -> None:
    """Lets go of a layer's memory: it is on disk."""
    for parameter in layer.parameters():
        parameter.data = torch.empty(0)


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/`, `masks.safetensors` and `layers.csv`."""
    origin = models.dense_folder(recipe, inputs)
    settings = recipe.calibration
    tokenizer = models.tokenizer(origin, recipe)
    model = models.load(origin, recipe)
    models.check_length(model.config, "calibration.seq_len", settings.seq_len)
    pattern = patterns.parse(recipe.prune.sparsity)
    decoder = Decoder(model)
    check_fit(decoder, pattern)

    source = data.source(settings.dataset, recipe.mirror, settings.split, settings.config)
    windows_NT = data.calibration(source, tokenizer, settings.samples, settings.seq_len, recipe.seed)
    models.check_vocabulary(model.config, windows_NT, source)
    batches = windows_NT.split(settings.batch_size)
    if len(batches) < processes.world_size():
        raise UserError(
            f"{len(batches)} batches of calibration samples cannot be shared by {processes.world_size()} processes: "
            f"type calibration.samples={settings.batch_size * processes.world_size()} or more"
        )
    walk = LayerWalk(decoder, list(batches[processes.rank() :: processes.world_size()]), folder)
    if walk.finished_before:
        processes.say(
            f"  {len(walk.finished_before)} of {len(decoder.layers)} layers were pruned before: only passed through"
        )
    trainer = Trainer(
        callbacks=[METHODS[recipe.prune.method](pattern, processes.all_sum, processes.say), LayerWriter(folder)],
        inference_mode=False,  # else the weights become inference tensors, and a later fit of them dies
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,  # each layer says a line, also off a terminal
        **processes.trainer_arguments(),
    )
    assert trainer.world_size == processes.world_size()
    processes.barrier()  # a rank late to look for finished shards must not see new ones
    trainer.predict(walk, DataLoader(decoder.layers, batch_size=None), return_predictions=False)
    if processes.is_main():
        finish(walk, origin, recipe)


def check_fit(decoder: Decoder, pattern: patterns.Pattern) -> None:
    for index, layer in enumerate(decoder.layers):
        for name, module in matrices(layer).items():
            if problem := pattern.misfit(weight_OI(module).shape[1]):
                name = decoder.parameter_name(index, name)
                raise UserError(f"prune.sparsity={pattern}: {name} has {problem}; a ratio such as 0.5 always can")


def finish(walk: LayerWalk, origin: Path, recipe: Recipe) -> None:
    """The rest of the model folder, all masks in one file, all rows in one table."""
    decoder, folder = walk.decoder, walk.folder
    in_layers = decoder.prefix + "."
    state = decoder.model.state_dict()
    tied = (
        {name for name in state}
        - {n for n, _ in decoder.model.named_parameters()}
        - {n for n, _ in decoder.model.named_buffers()}
    )
    rest = {k: v.contiguous().cpu() for k, v in state.items() if not k.startswith(in_layers) and k not in tied}
    with files.whole(walk.shard(len(decoder.layers))) as beside:
        save_file(rest, beside, {"format": "pt"})
    models.write_index(folder / "model")
    models.copy_beside(origin, folder / "model", recipe.dtype)

    masks, rows = Masks(), []
    for index in range(len(decoder.layers)):
        part, row = Masks.load(walk.masks_file(index))
        masks.update_from(part)
        rows.append(row)
    masks.check_patterns()
    masks.save(folder / "masks.safetensors")
    with open(folder / "layers.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    shutil.rmtree(folder / "masks")
