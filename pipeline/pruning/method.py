"""The base class of prune methods."""

import functools
import math
from collections import defaultdict

import torch
from torch import Tensor

from pipeline.pruning import gram, statistics
from pipeline.registry.entry import is_file
from pipeline.runtime.errors import UserError
from pipeline.runtime.readings import Readings
from pipeline.runtime.user_code import check_returned, unchanged
from pipeline.settings.schema import Prune
from pipeline.sparsity import masks
from pipeline.sparsity.patterns import Pattern, Unstructured


class PruneMethod:
    """Sums `observe` of a matrix's inputs over all tokens and ranks, and prunes the weights with the lowest `score`.

    `patterns`: the pattern of each matrix to prune, by parameter name. A subclass implements `score`. A subclass in a user's
    file may set `label`, `description` and `citation` for checks and reports.
    """

    statistic = statistics.SQUARE_SUM  # a name in statistics.py; not used if a subclass overrides `observe`
    copies = 2  # the float32 copies of matrices with the same inputs that `prune` holds, to predict its memory
    whole_matrix = False  # unstructured patterns: compare scores over the matrix instead of within each output row

    def __init__(self, settings: Prune, patterns: dict[str, Pattern]) -> None:
        self.settings, self.patterns = settings, patterns
        default = "matrix" if self.whole_matrix else "row"
        self.group = default if settings.group == "auto" else settings.group
        self._layer_masks: dict[str, Tensor] = {}  # from `compare_layer` until `select` returns them
        self.readings = Readings()  # numbers that the pruner reads from the GPU at the end of a layer

    def observe(self, input_NI: Tensor) -> Tensor:
        """The statistic to sum (in float64) over a matrix's inputs. Default: the square sum of each feature, (I,)."""
        return statistics.OBSERVE[self.statistic](input_NI)

    def score(self, weight_OI: Tensor, total: Tensor) -> Tensor:
        """The importance of each weight, (O, I). `total`: the sum of `observe` over all tokens."""
        raise NotImplementedError

    def select(self, name: str, score_OI: Tensor) -> Tensor:
        """The mask, (O, I), True = kept."""
        if name in self._layer_masks:
            return self._layer_masks.pop(name)
        return self.select_among(name, score_OI)

    def select_among(self, name: str, score_OI: Tensor) -> Tensor:
        """The pattern's mask of some columns. Raises `UserError` if a user's pattern returns something else."""
        mask_OI = self.patterns[name].select(score_OI, self.group == "matrix")
        check_returned(f"{self.patterns[name]}.select", mask_OI, score_OI.shape, torch.bool, name)
        return mask_OI

    def checked_score(self, name: str, weight_OI: Tensor, total: Tensor) -> Tensor:
        """`score`, which may be a user's."""
        who = f"{type(self).__name__}.score"
        with unchanged(who, weight_OI=weight_OI, total=total):
            score_OI = self.score(weight_OI, total)
        check_returned(who, score_OI, weight_OI.shape, name=name)
        return score_OI

    def prune(self, weights: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
        """Prunes in place the weights (O, I) of matrices with the same inputs; returns their masks by name."""
        chosen = {}
        for name, weight_OI in weights.items():
            score_OI = self.checked_score(name, weight_OI, total)
            check_finite(self.readings, score_OI, f"{type(self).__name__}'s scores of {name} are not finite")
            chosen[name] = self.select(name, score_OI)
            masks.apply_(weight_OI, chosen[name])
        return chosen

    def checked_prune(self, weights: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
        """`prune`, which may be a user's."""
        chosen = self.prune(weights, total)
        if is_file(self.settings.method):
            who = f"{type(self).__name__}.prune"
            if not isinstance(chosen, dict) or weights.keys() - chosen.keys():
                raise UserError(
                    f"{who} did not return a mask for each of {', '.join(weights)}: return a dict of masks by name"
                )
            for name, weight_OI in weights.items():
                check_returned(who, chosen[name], weight_OI.shape, torch.bool, name)
                check_finite(self.readings, weight_OI, f"{who} made weights of {name} that are not finite")
                masks.apply_(weight_OI, chosen[name])
        return chosen

    def compare_layer(self, inputs: list[tuple[dict[str, Tensor], Tensor]]) -> None:
        """With `prune.group=layer`, compares the scores of all matrices of a layer that have the same ratio, and stores their
        masks, which `select` returns. Called before `prune` is called for each pair of weights and total in `inputs`."""
        if self.group != "layer":
            return
        if type(self).score is PruneMethod.score:
            raise UserError(f"{type(self).__name__} has no `score` to compare over a layer: set prune.group=auto")
        scores_by_ratio: dict[float, dict[str, Tensor]] = defaultdict(dict)
        for weights, total in inputs:
            for name, weight_OI in weights.items():
                if isinstance(self.patterns[name], Unstructured):
                    score_OI = self.checked_score(name, weight_OI, total)
                    scores_by_ratio[self.patterns[name].ratio][name] = score_OI
        for ratio, scores in scores_by_ratio.items():
            all_scores = torch.cat([score_OI.flatten() for score_OI in scores.values()])[None]
            pattern = Unstructured(ratio)
            kept = pattern.select(all_scores, whole_matrix=True)[0]
            # equal scores go together, such as the zeros of dead inputs; `pattern` takes any ratio for a matrix's own
            self.readings.add([pattern.is_broken(kept[None])], functools.partial(_refuse_ratio, pattern, list(scores)))
            parts = kept.split([score_OI.numel() for score_OI in scores.values()])
            for (name, score_OI), part in zip(scores.items(), parts):
                self._layer_masks[name] = part.view_as(score_OI)

    def gram(self, weights: dict[str, Tensor], total: Tensor) -> Tensor:
        """The Gram matrix of the inputs, (I, I) in fp32, from what `prune` gets. Raises `UserError` if it is not summed."""
        if self.statistic != statistics.GRAM or type(self).observe is not PruneMethod.observe:
            raise UserError(f"{type(self).__name__} sums no Gram matrix: set prune.update=obs or prune.target=pruned")
        return gram.unpacked(total, next(iter(weights.values())).shape[1])

    def pattern(self, name: str, mask_OI: Tensor) -> Pattern:
        """The pattern of a mask: that of `patterns`, or the matrix's actual ratio if scores were compared over the layer."""
        pattern = self.patterns[name]
        if self.group == "layer" and isinstance(pattern, Unstructured):
            pruned = 1 - mask_OI.count_nonzero().item() / mask_OI.numel()
            return Unstructured(min(max(round(pruned, 4), 1e-4), 1 - 1e-4))  # mask files have no ratio of 0 or 1
        return pattern


def _refuse_ratio(pattern: Pattern, names: list[str], broken: float) -> None:
    if broken:
        raise UserError(
            f"too many weights of {names[0]} and the rest of its layer have equal scores to prune {pattern} of them: set "
            "prune.group=auto, or another prune.method"
        )


def stacked(weights: dict[str, Tensor]) -> Tensor:
    """A copy in fp32 of the weights (O, I) of matrices with the same inputs, (R, I)."""
    return torch.cat(list(weights.values())).float()


def check_finite(readings: Readings, tensor: Tensor, problem: str) -> None:
    """Makes `readings` raise `UserError(problem)` unless all values are finite. Reads only the extremes, which are NaN or
    infinite if any value is: `isfinite().all()` would allocate a mask."""

    def check(lowest: float, highest: float) -> None:
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise UserError(problem)

    readings.add(tensor.aminmax(), check)
