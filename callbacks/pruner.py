"""Prunes each decoder layer as the walk passes it. A new method is a subclass with a score."""

import time
from collections.abc import Callable

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from pipeline import masks, scores
from pipeline.decoder import is_transposed, matrices, weight_OI
from pipeline.errors import UserError
from pipeline.patterns import NofM, Pattern
from pipeline.watch import InputWatch


class LayerPruner(Callback):
    """Watches the inputs of a layer's matrices, sums what `observe` makes of them over all ranks, and prunes by `score`."""

    whole_matrix = False  # unstructured: compare over the matrix instead of within each output row

    def __init__(
        self, pattern: Pattern, all_sum: Callable[[Tensor], Tensor], say: Callable[[str], None] = print
    ) -> None:
        self.pattern, self.all_sum, self.say = pattern, all_sum, say

    def observe(self, input_NI: Tensor) -> Tensor:
        """What to sum over the inputs of a matrix, in float64. Default: the square sum of each feature, (I,)."""
        return scores.square_sum(input_NI)

    def score(self, weight_OI: Tensor, total: Tensor) -> Tensor:
        """The importance of each weight, (O, I), from the weight and the sum of what was observed; the lowest go."""
        raise NotImplementedError

    def on_predict_batch_start(self, trainer, walk, layer: nn.Module, index: int, dataloader_idx: int = 0) -> None:
        if not walk.is_finished(index):
            self.started = time.perf_counter()
            walk.watch = InputWatch(matrices(layer), self.observe)

    def on_predict_batch_end(
        self, trainer, walk, outputs, layer: nn.Module, index: int, dataloader_idx: int = 0
    ) -> None:
        if walk.watch is None:
            return
        watch, walk.watch = walk.watch, None
        watch.close()
        for leader in sorted(watch.totals):
            self.all_sum(watch.totals[leader])
        errors = []
        for matrix, module in matrices(layer).items():
            name = walk.decoder.parameter_name(index, matrix)
            if matrix not in watch.leader:
                raise UserError(f"{name} saw no calibration text: the layer never calls it")
            leader = watch.leader[matrix]
            dense_OI = weight_OI(module).clone()
            mask_OI = self.prune(name, weight_OI(module), watch.totals[leader])
            errors.append(scores.relative_error(watch.samples[leader], dense_OI, weight_OI(module)))
            transposed = is_transposed(module)
            walk.masks.add(name, mask_OI.T if transposed else mask_OI, str(self.pattern), transposed)
        seconds = time.perf_counter() - self.started
        walk.log_row = {
            "layer": index,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(walk.tokens / seconds, 1),
            "sparsity": walk.masks.sparsity(),
            "relative_output_error": sum(errors) / len(errors),
            "memory_gib": round(_memory_gib(walk.device), 3),
        }
        self.say(
            f"  layer {index + 1}/{len(walk.decoder.layers)}: sparsity {walk.masks.sparsity():.4f}, output error "
            f"{walk.log_row['relative_output_error']:.3f}, {seconds:.1f} s"
        )

    def prune(self, name: str, weight_OI: Tensor, total: Tensor) -> Tensor:
        """Zeroes the lowest scores in place and returns the mask, (O, I)."""
        if not total.isfinite().all():
            raise UserError(f"the inputs of {name} are not finite: try dtype=float32 or bfloat16")
        score_OI = self.score(weight_OI, total)
        if not score_OI.isfinite().all():
            raise UserError(
                f"{name} holds weights that are not finite: the model files are damaged, or its training diverged"
            )
        if self.whole_matrix and not isinstance(self.pattern, NofM):
            mask_OI = self.pattern.select(score_OI.reshape(1, -1)).view_as(score_OI)
        else:
            mask_OI = self.pattern.select(score_OI)
        masks.apply_(weight_OI, mask_OI)
        return mask_OI


class WandaPruner(LayerPruner):
    """Sun et al. 2023: weight times input norm, compared within each output row."""

    def score(self, weight_OI: Tensor, total: Tensor) -> Tensor:
        return scores.wanda(weight_OI, total)


class MagnitudePruner(LayerPruner):
    """The weight alone, compared over the whole matrix."""

    whole_matrix = True

    def score(self, weight_OI: Tensor, total: Tensor) -> Tensor:
        return scores.magnitude(weight_OI)


METHODS: dict[str, type[LayerPruner]] = {"wanda": WandaPruner, "magnitude": MagnitudePruner}


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
