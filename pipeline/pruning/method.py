"""The base class of prune methods."""

import torch
from torch import Tensor

from pipeline.pruning import statistics
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Prune
from pipeline.sparsity import masks
from pipeline.sparsity.patterns import Pattern


class PruneMethod:
    """Sums `observe` of a matrix's inputs over all tokens and ranks, and prunes the weights with the lowest `score`.

    `patterns`: the pattern of each matrix to prune, by parameter name. A method is a subclass with a `score`; one in a user's
    file may set `label`, `description` and `citation` for checks and reports.
    """

    statistic = statistics.SQUARE_SUM  # of statistics.py, unless a subclass has an `observe`
    whole_matrix = False  # unstructured patterns: compare scores over the matrix instead of within each output row

    def __init__(self, settings: Prune, patterns: dict[str, Pattern]) -> None:
        self.settings, self.patterns = settings, patterns

    def observe(self, input_NI: Tensor) -> Tensor:
        """The statistic to sum (in float64) over a matrix's inputs. Default: the square sum of each feature, (I,)."""
        return statistics.OBSERVE[self.statistic](input_NI)

    def score(self, weight_OI: Tensor, total: Tensor) -> Tensor:
        """The importance of each weight, (O, I). `total`: the sum of `observe` over all tokens."""
        raise NotImplementedError

    def select(self, name: str, score_OI: Tensor) -> Tensor:
        """The mask, (O, I), True = kept. Raises `UserError` if a user's pattern returns something else."""
        mask_OI = self.patterns[name].select(score_OI, self.whole_matrix)
        if mask_OI.dtype != torch.bool or mask_OI.shape != score_OI.shape:
            raise UserError(
                f"{self.patterns[name]}.select returned {mask_OI.dtype} of {tuple(mask_OI.shape)} for {name}: "
                f"return torch.bool of {tuple(score_OI.shape)}"
            )
        return mask_OI

    def prune(self, weights: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
        """Prunes in place the weights (O, I) of matrices with the same inputs; returns their masks by name."""
        chosen = {}
        for name, weight_OI in weights.items():
            score_OI = self.score(weight_OI, total)
            if not is_finite(score_OI):
                raise UserError(f"{type(self).__name__}'s scores of {name} are not finite")
            chosen[name] = self.select(name, score_OI)
            masks.apply_(weight_OI, chosen[name])
        return chosen


def is_finite(tensor: Tensor) -> bool:
    """Checks only the extremes, where NaN and infinities show: `isfinite().all()` would allocate a tensor of flags."""
    return all(extreme.isfinite().item() for extreme in tensor.aminmax())
