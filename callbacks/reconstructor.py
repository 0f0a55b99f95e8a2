"""Trains each pruned layer, as the walk passes it, to give what the dense layer gives in the dense model."""

import time

from lightning.pytorch import Callback
from torch import nn

from pipeline import layer_fit, processes
from pipeline.decoder import Decoder
from pipeline.errors import UserError
from pipeline.masks import Masks
from pipeline.memory import peak_gib
from pipeline.recipe import Reconstruct
from pipeline.walk import release


class LayerReconstructor(Callback):
    """Owns the dense model's hidden states and carries them along beside those of the walk through the pruned model.

    A layer's inputs are what the layers before it, reconstructed already, give it; its targets are the dense model's
    hidden states, so that it also makes good what the layers before it got wrong. `steps` and `held_out` say which of
    the walk's batches train and judge, see `layer_fit.fit`; `tokens` counts the judging ones of all ranks.
    """

    def __init__(
        self,
        dense: Decoder,
        masks: Masks,
        settings: Reconstruct,
        seed: int,
        steps: list[range],
        held_out: range,
        tokens: int,
    ) -> None:
        self.dense, self.masks, self.settings, self.seed = dense, masks, settings, seed
        self.steps, self.held_out, self.tokens = steps, held_out, tokens
        self.targets: list = []

    def on_predict_epoch_start(self, trainer, walk) -> None:
        self.dense.calls = walk.decoder.calls  # the same model but for its layers' weights: called alike, and
        self.targets = list(walk.hidden)  # embedded alike

    def on_predict_batch_end(
        self, trainer, walk, outputs, layer: nn.Module, index: int, dataloader_idx: int = 0
    ) -> None:
        started = time.perf_counter()
        teacher = self.dense.layers[index].to(walk.device)
        for i, hidden in enumerate(self.targets):
            self.targets[i] = walk.keep(self.dense.run(index, teacher, hidden.to(walk.device, non_blocking=True)))
        release(teacher)
        if walk.is_finished(index):
            return

        def error(batch: int):
            hidden, target = (
                states[batch].to(walk.device, non_blocking=True) for states in (walk.hidden, self.targets)
            )
            return layer_fit.token_error(walk.decoder.run(index, layer, hidden), target)

        names = {name: walk.decoder.parameter_name(index, name) for name, _ in layer.named_parameters()}
        masks = {name: self.masks.of(names[name], parameter) for name, parameter in layer.named_parameters()}
        masks = {name: mask.to(walk.device) for name, mask in masks.items() if mask is not None}
        settings = self.settings
        try:
            before, after = layer_fit.fit(
                layer,
                masks,
                error,
                self.steps,
                self.held_out,
                self.tokens,
                settings.epochs,
                settings.lr,
                self.seed,
                processes.all_sum,
            )
        except UserError as problem:
            raise UserError(
                f"reconstruction diverges in layer {index + 1} of {len(walk.decoder.layers)} "
                f"({walk.decoder.prefix}.{index}): {problem}; type reconstruct.lr={settings.lr / 10:g}"
            ) from None
        seconds = time.perf_counter() - started
        walk.log_row = {
            "layer": index,
            "seconds": round(seconds, 4),
            "error_before": before,
            "error_after": after,
            "memory_gib": round(peak_gib(walk.device), 3),
        }
        processes.say(
            f"  layer {index + 1}/{len(walk.decoder.layers)}: held-out error {before:.4f} -> {after:.4f}, {seconds:.1f} s"
            + ("" if after < before else " (no better: it stays as it was pruned)")
        )
