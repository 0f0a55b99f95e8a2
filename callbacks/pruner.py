"""Prunes each decoder layer as the walk passes it. A new method is a subclass with a score."""

import time
from collections import defaultdict

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from pipeline import masks, processes, scores
from pipeline.decoder import Matrix, matrices
from pipeline.errors import UserError
from pipeline.memory import peak_gib
from pipeline.patterns import Pattern
from pipeline.recipe import Prune
from pipeline.watch import InputWatch

FEW_TOKENS = 32  # below, an expert's statistics say more of the sample than of the expert


class LayerPruner(Callback):
    """Watches the inputs of a layer's matrices, sums what `observe` makes of them over all ranks, and prunes by `score`.

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

    def on_predict_batch_start(self, trainer, walk, layer: nn.Module, index: int, dataloader_idx: int = 0) -> None:
        if not walk.is_finished(index):
            self.started = time.perf_counter()
            walk.watch = InputWatch(matrices(layer), self.observe)

    def on_predict_batch_end(self, trainer, walk, outputs, layer, index: int, dataloader_idx: int = 0) -> None:
        if walk.watch is None:
            return
        watch, walk.watch = walk.watch, None
        watch.close()
        found = matrices(layer)
        names = {matrix: walk.decoder.parameter_name(index, matrix) for matrix in found}
        groups = defaultdict(dict)  # leader -> the matrices with the same inputs, by parameter name
        for name, matrix in found.items():
            leader = watch.leader_of(name)
            if names[name] in self.patterns:
                groups[leader][names[name]] = matrix
        rows = []
        self.starved: list[str] = []
        for leader, members in groups.items():
            total = self._total(watch, leader, members)
            weights = {name: matrix.weight_OI for name, matrix in members.items()}
            _check_finite(weights, total)
            dense_OI = {name: weight.clone() for name, weight in weights.items()}
            masks_OI = self.prune(weights, total)
            for name, matrix in members.items():
                if problem := self.patterns[name].violation(masks_OI[name]):
                    raise UserError(f"{type(self).__name__} on {name}: {problem}")
                walk.masks.add(name, matrix.stored(masks_OI[name]), str(self.patterns[name]), matrix.transposed)
                share, error = 1 - masks_OI[name].count_nonzero().item() / masks_OI[name].numel(), None
                if len(watch.samples[leader]):  # no token of this rank reached some experts
                    error = scores.relative_error(watch.samples[leader], dense_OI[name], weights[name])
                rows.append({"layer": index, "matrix": name, "sparsity": share, "relative_output_error": error})
        if self.starved:
            processes.say(f"  fewer than {FEW_TOKENS} tokens, so judged by weight alone: {', '.join(self.starved)}")
        self._log(walk, index, rows)

    def _total(self, watch: InputWatch, leader: str, members: dict[str, Matrix]) -> Tensor:
        """The sum over all ranks; for an expert that hardly a token reached, that of inputs which are all alike."""
        total = processes.all_sum(watch.totals.pop(leader))
        first = next(iter(members.values()))
        if first.expert is not None:
            tokens = processes.all_sum(torch.tensor(watch.tokens[leader], device=total.device)).item()
            if tokens < FEW_TOKENS:
                self.starved += [f"{name} ({tokens})" for name in members]
                return self.observe(torch.eye(first.weight_OI.shape[1], device=total.device)).double()
        return total

    def _log(self, walk, index: int, rows: list[dict]) -> None:
        seconds = time.perf_counter() - self.started
        errors = [row["relative_output_error"] for row in rows if row["relative_output_error"] is not None]
        error, sparsity = sum(errors) / max(1, len(errors)), walk.masks.sparsity()
        walk.log_row = {
            "layer": index,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(walk.tokens * processes.world_size() / seconds, 1),
            "sparsity": sparsity,
            "relative_output_error": error,
            "memory_gib": round(peak_gib(walk.device), 3),
            "matrices": rows,
        }
        processes.say(
            f"  layer {index + 1}/{len(walk.decoder.layers)}: sparsity {sparsity:.4f}, "
            f"output error {error:.3f}, {seconds:.1f} s"
        )


def _check_finite(weights: dict[str, Tensor], total: Tensor) -> None:
    for name, weight in weights.items():
        if not _is_finite(weight):
            raise UserError(
                f"{name} holds weights that are not finite: the files are damaged, or its training diverged"
            )
    if not _is_finite(total):
        half = any(weight.dtype == torch.float16 for weight in weights.values())
        hint = "type dtype=bfloat16 or dtype=float32" if half else "weights before it are damaged, or too large"
        raise UserError(f"the inputs of {' and '.join(weights)} are not finite: {hint}")


def _is_finite(tensor: Tensor) -> bool:
    """Without a tensor of as many flags: NaN and infinities show in the extremes."""
    return all(extreme.isfinite().item() for extreme in tensor.aminmax())
