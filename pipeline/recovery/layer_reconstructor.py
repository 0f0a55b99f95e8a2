"""The visitor of `run_layerwise` that trains each pruned layer towards the hidden states of the dense model."""

import itertools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.engine.block_store import BlockResult
from pipeline.engine.blocks import Block
from pipeline.engine.layerwise import LayerwiseForwards
from pipeline.engine.walk import LayerWalk
from pipeline.recovery import layer_fit
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.runtime.memory import peak_gib
from pipeline.settings.schema import Reconstruct
from pipeline.sparsity.masks import Masks

QUIET_SECONDS = 30  # time on a layer after which each epoch prints a line


class LayerReconstructor:
    """Runs the forwards of the dense model in step with the walk, whose forwards are those of the pruned model.

    A layer's inputs are the outputs of the layers before it, already reconstructed. Its targets are the hidden states of the
    dense model, so a layer also corrects errors of earlier layers. `steps` are the batches of each optimizer step, see
    `layer_fit.fit`; the batches after them are held out to measure the error.
    """

    def __init__(
        self, dense: LayerwiseForwards, masks: Masks, settings: Reconstruct, seed: int, steps: list[range]
    ) -> None:
        self.dense, self.masks, self.settings, self.seed, self.steps = dense, masks, settings, seed, steps
        self.targets: list[Tensor] = []
        self.passed: set[int] = set()  # the ids of parameters of the blocks before

    def _start(self, walk: LayerWalk) -> None:
        self.dense.start()
        self.targets = [torch.empty(0)] * len(walk.batches)
        self.judging = range(self.steps[-1].stop, len(walk.batches))

    def __call__(self, walk: LayerWalk, block: Block) -> BlockResult | None:
        """Trains a block that is not finished, in place."""
        started = time.perf_counter()
        if not self.targets:
            self._start(walk)

        def on_output(i: int, hidden: Tensor) -> None:
            self.targets[i] = hidden if walk.hidden_device is None else hidden.to(walk.hidden_device)

        while self.dense.current.index != block.index:  # blocks that the model calls again
            self._advance()
        self._advance(on_output)
        own = self._own(walk, block)
        self.passed |= set(map(id, block.module.parameters()))
        if walk.is_finished(block):
            return None
        before, after = self._fit(walk, block, own)
        seconds = time.perf_counter() - started
        found = f"{before:.4f} -> {after:.4f}" if after < before else f"{before:.4f}, no better: left unchanged"
        processes.say(f"  layer {block.index + 1}/{len(walk.blocks)}: held-out error {found}, {seconds:.1f} s")
        row = {"layer": block.index, "seconds": round(seconds, 4), "error_before": before, "error_after": after}
        return BlockResult(Masks(), row | {"memory_gib": round(peak_gib(walk.device), 3)})

    def _own(self, walk: LayerWalk, block: Block) -> dict[str, nn.Parameter]:
        """The parameters in the block's shard, except those that an earlier block shares, which were trained there."""
        named = block.module.named_parameters()
        return {n: p for n, p in named if walk.results.holds(block, n) and id(p) not in self.passed}

    def _advance(self, on_output: Callable[[int, Tensor], None] | None = None) -> None:
        for _ in self.dense.advance(on_output):
            pass

    def _fit(self, walk: LayerWalk, block: Block, parameters: dict[str, nn.Parameter]) -> tuple[float, float]:
        started, epochs_done = time.perf_counter(), itertools.count()
        epochs, lr = self.settings.epochs, self.settings.lr
        convolves = any(isinstance(module, nn.Conv2d) for module in block.module.modules())
        features = 1 if convolves and self.targets[0].dim() == 4 else -1  # (B, C, H, W)

        def error(batch: int) -> Tensor:
            target = self.targets[batch].to(walk.device, non_blocking=True)
            return layer_fit.token_error(walk.forwards.run_block(batch), target, features)

        def judge() -> float:
            """Root of the mean over tokens."""
            total = torch.zeros(2, dtype=torch.float64, device=walk.device)
            for batch in self.judging:
                tokens = self.targets[batch].select(features, 0).numel()
                total += torch.stack([error(batch).double(), total.new_tensor(tokens)])
            sum_, tokens = processes.all_sum(total).tolist()
            found = math.sqrt(sum_ / tokens)
            epoch, seconds = next(epochs_done), time.perf_counter() - started
            if seconds > QUIET_SECONDS:
                processes.say(f"    epoch {epoch}/{epochs}: held-out error {found:.4f}, {seconds:.0f} s")
            return found

        masks = {}
        for name, parameter in parameters.items():
            mask = self.masks.for_parameter(f"{block.name}.{name}", parameter)
            if mask is not None:
                masks[name] = mask.to(walk.device)
        try:
            return layer_fit.fit(parameters, masks, self.steps, error, judge, processes.all_sum, epochs, lr, self.seed)
        except UserError as problem:
            raise UserError(
                f"the reconstruction of {block.name} diverges, {problem}: set reconstruct.lr={lr / 10:g}"
            ) from None
