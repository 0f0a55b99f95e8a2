"""Prunes each block as the walk reaches it. A new method is a subclass with a score."""

import time
from collections import defaultdict

import torch
from lightning.pytorch import Callback
from torch import Tensor

from pipeline.engine.matrices import matrices
from pipeline.pruning import scores
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.runtime.memory import peak_gib
from pipeline.settings.schema import Prune
from pipeline.sparsity import masks
from pipeline.sparsity.patterns import Pattern

FEW_TOKENS = 32  # below, an expert's statistics say more of the sample than of the expert


class LayerPruner(Callback):
    """Sums what `observe` makes of the inputs of a block's matrices, over all tokens and ranks, and prunes by `score`.

    `patterns` gives the pattern of each matrix by its parameter's name; a matrix that it lacks stays dense.
    """

    whole_matrix = False  # unstructured: compare over the matrix instead of within each output row

    def __init__(self, settings: Prune, patterns: dict[str, Pattern]) -> None:
        self.settings, self.patterns = settings, patterns

    def observe(self, input_NI: Tensor) -> Tensor:
        """What to sum over the inputs of a matrix; the sum is in float64. Default: the square sum of each feature, (I,)."""
        return scores.square_sum(input_NI)

    def score(self, weight_OI: Tensor, total: Tensor) -> Tensor:
        """The importance of each weight, (O, I), from the weight and the sum of what was observed; the lowest go."""
        raise NotImplementedError

    def select(self, name: str, score_OI: Tensor) -> Tensor:
        """The mask of the weights that stay, (O, I); `UserError` where a pattern of one's own gives something else."""
        mask_OI = self.patterns[name].select(score_OI, self.whole_matrix)
        if mask_OI.dtype != torch.bool or mask_OI.shape != score_OI.shape:
            raise UserError(
                f"{self.patterns[name]}.select gave {mask_OI.dtype} of {tuple(mask_OI.shape)} for {name}: "
                f"it should give torch.bool of {tuple(score_OI.shape)}"
            )
        return mask_OI

    def prune(self, weights: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
        """Zeroes in place the weights (O, I) of matrices that share their inputs, and returns their masks."""
        found = {}
        for name, weight_OI in weights.items():
            score_OI = self.score(weight_OI, total)
            if not _is_finite(score_OI):
                raise UserError(f"the {type(self).__name__}'s scores of {name} are not finite")
            found[name] = self.select(name, score_OI)
            masks.apply_(weight_OI, found[name])
        return found

    def on_predict_start(self, trainer, walk) -> None:
        self.started = time.perf_counter()

    def on_predict_batch_end(self, trainer, walk, outputs, block, number: int, dataloader_idx: int = 0) -> None:
        if walk.is_finished(block):
            self.started = time.perf_counter()
            return
        found = matrices(block, walk.blocks)
        observed = walk.observe(found, self.observe)
        groups = defaultdict(dict)  # matrices with the same inputs, by name
        for name, matrix in found.items():
            if name in self.patterns and name in observed.shared_input_key:
                groups[observed.shared_input_key[name]][name] = matrix
        rows = []
        undersampled: list[str] = []
        for key, members in groups.items():
            total = observed.totals.pop(key)
            first = next(iter(members.values()))
            if first.routed and observed.tokens[key] < FEW_TOKENS:
                undersampled += [f"{name} ({observed.tokens[key]})" for name in members]
                # that of inputs which are all alike
                total = self.observe(torch.eye(first.weight_OI.shape[1], device=total.device)).double()
            weights = {name: matrix.weight_OI for name, matrix in members.items()}
            _check_finite(weights, total)
            dense_OI = {name: weight.clone() for name, weight in weights.items()}
            masks_OI = self.prune(weights, total)
            for name, matrix in members.items():
                if problem := self.patterns[name].violation(masks_OI[name]):
                    raise UserError(f"{type(self).__name__} on {name}: {problem}")
                walk.masks.add(name, matrix.stored(masks_OI[name]), str(self.patterns[name]), matrix.transposed)
                share, error = 1 - masks_OI[name].count_nonzero().item() / masks_OI[name].numel(), None
                if len(observed.samples[key]):  # no token of this rank reached some experts
                    error = scores.relative_error(observed.samples[key], dense_OI[name], weights[name])
                rows.append({"layer": block.index, "matrix": name, "sparsity": share, "relative_output_error": error})
        if undersampled:
            processes.say(f"  fewer than {FEW_TOKENS} tokens, so judged by weight alone: {', '.join(undersampled)}")
        for name in self.patterns.keys() & (found.keys() - observed.shared_input_key.keys()):
            processes.say(f"  stays dense, for the model never calls it with calibration text: {name}")
        self._log(walk, block, rows)

    def _log(self, walk, block, rows: list[dict]) -> None:
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        errors = [row["relative_output_error"] for row in rows if row["relative_output_error"] is not None]
        error, sparsity = sum(errors) / max(1, len(errors)), walk.masks.sparsity()
        walk.log_row = {
            "layer": block.index,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(walk.tokens * processes.world_size() / seconds, 1),
            "sparsity": sparsity,
            "relative_output_error": error,
            "memory_gib": round(peak_gib(walk.device), 3),
            "matrices": rows,
        }
        processes.say(
            f"  layer {block.index + 1}/{len(walk.blocks)}: sparsity {sparsity:.4f}, output error {error:.3f}, {seconds:.1f} s"
        )


def _check_finite(weights: dict[str, Tensor], total: Tensor) -> None:
    for name, weight in weights.items():
        if not _is_finite(weight):
            raise UserError(
                f"{name} holds weights that are not finite: the files are damaged, or its training diverged"
            )
    if not _is_finite(total):
        half = any(weight.dtype == torch.float16 for weight in weights.values())
        hint = "set dtype=bfloat16 or dtype=float32" if half else "weights before it are damaged, or too large"
        raise UserError(f"the inputs of {' and '.join(weights)} are not finite: {hint}")


def _is_finite(tensor: Tensor) -> bool:
    """Without a tensor of as many flags: NaN and infinities show in the extremes."""
    return all(extreme.isfinite().item() for extreme in tensor.aminmax())
