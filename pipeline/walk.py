"""Owns the walk over the decoder layers, in which a batch is a layer; pruning or reconstructing it is a callback."""

import contextlib
import csv
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.stop_at_signal import StopAtSignal
from pipeline import checksums, files, models, processes
from pipeline.decoder import Decoder, release
from pipeline.masks import Masks
from pipeline.watch import EveryInputSeen, InputWatch


class LayerWalk(LightningModule):
    """Owns this rank's hidden states and carries them from layer to layer.

    A step forwards them through the layer just finished, so that each layer sees what the new model will give it, and
    then, where a callback watches, shows them to the next layer, whose matrices' inputs decide what goes. A layer
    whose shard and masks lie whole in `folder` was finished by an earlier try: its weights are read from there, and it is only
    passed through.
    """

    def __init__(
        self, decoder: Decoder, batches: list[Tensor], folder: Path | None, store: torch.device | None
    ) -> None:
        super().__init__()
        object.__setattr__(self, "decoder", decoder)  # not in _modules: Lightning must not move, wrap or save the model
        self.batches, self.folder, self.store = batches, folder, store
        self.tokens = sum(batch.numel() for batch in batches)
        self.hidden: list[Tensor] = []
        self.previous: nn.Module | None = None
        self.watch: InputWatch | None = None
        self.masks = Masks()  # of the layer at hand
        self.log_row: dict = {}
        self.finished_before = processes.from_main(
            self._find_finished() if folder and processes.is_main() else frozenset()
        )

    def _find_finished(self) -> frozenset[int]:
        damaged = checksums.damaged(self.folder)
        if damaged:
            processes.say(f"  damaged, so made again: {', '.join(damaged)}")
        whole = {self.folder / name for name in checksums.recorded(self.folder) if name not in damaged}
        return frozenset(i for i in range(len(self.decoder.layers)) if {self.shard(i), self.masks_file(i)} <= whole)

    def is_finished(self, index: int) -> bool:
        return index in self.finished_before

    def shard(self, index: int) -> Path:
        count = len(self.decoder.layers) + 1
        return self.folder / "model" / f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def masks_file(self, index: int) -> Path:
        return self.folder / "masks" / f"{index:05d}.safetensors"

    def on_predict_start(self) -> None:
        self.decoder.place(self.device)
        self.hidden = [self.keep(self.decoder.embed(batch.to(self.device))) for batch in self.batches]

    def keep(self, hidden: Tensor) -> Tensor:
        """Where hidden states wait: on the device, or in the host's memory, pinned so that copies overlap."""
        if self.store is None or self.store == hidden.device:
            return hidden
        return torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=hidden.is_cuda).copy_(hidden, non_blocking=True)

    def predict_step(self, layer: nn.Module, index: int) -> None:
        for i, hidden in enumerate(self.hidden if self.previous is not None else ()):
            moved = hidden.to(self.device, non_blocking=True)
            self.hidden[i] = self.keep(self.decoder.run(index - 1, self.previous, moved))
        if self.previous is not None:
            release(self.previous)
        self.masks = Masks()
        if self.is_finished(index):
            weights = load_file(self.shard(index), device=str(self.device))
            prefix = f"{self.decoder.prefix}.{index}."
            layer.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items()}, assign=True)
        elif self.watch is not None:
            for hidden in self.hidden:
                self.watch.next_batch()
                with contextlib.suppress(EveryInputSeen):
                    self.decoder.run(index, layer, hidden.to(self.device, non_blocking=True))
        self.previous = layer


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


def write_outside(walk: LayerWalk, origin: Path, dtype: str) -> None:
    """The rest of the model folder: what lies outside the layers, the index, and all that is no weight."""
    decoder, model = walk.decoder, walk.decoder.model
    once = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    state = model.state_dict()  # holds tied weights twice, which a file must not
    in_layers = decoder.prefix + "."
    rest = {k: v.contiguous().cpu() for k, v in state.items() if k in once and not k.startswith(in_layers)}
    with files.whole(walk.shard(len(decoder.layers))) as beside:
        save_file(rest, beside, {"format": "pt"})
    models.write_index(walk.folder / "model")
    models.copy_beside(origin, walk.folder / "model", dtype)


def write_rows(path: Path, rows: list[dict]) -> None:
    """As CSV, layer and matrix first; no file without a row."""
    if not rows:
        return
    columns = sorted(rows[0], key=("layer", "matrix").__contains__, reverse=True)
    with files.whole(path) as beside, open(beside, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
