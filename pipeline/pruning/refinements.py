"""The refinements of `prune.refine`: a better mask from any mask, with the same number of kept weights in each row or group.

Shapes: R = rows (output features), I = in_features.
"""

from torch import Tensor

from pipeline.pruning import scores
from pipeline.pruning.statistics import GRAM, MOMENTS, Statistics
from pipeline.pruning.swap import swap
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Prune
from pipeline.sparsity.patterns import NofM, Pattern, Unstructured


class Refinement:
    """A subclass implements `refine` and lists in `needs` the statistics of the inputs that it uses (names in statistics.py).
    Rows are independent and are divided among the ranks. A subclass in a user's file may set `label`, `description` and
    `citation` for checks and reports."""

    needs: tuple[str, ...] = ()

    def __init__(self, settings: Prune) -> None:
        self.settings = settings

    def check(self, pattern: Pattern) -> None:
        """Raises `UserError` for a pattern that `refine` does not support; called before any text is read."""

    def refine(
        self, dense_RI: Tensor, weight_RI: Tensor, mask_RI: Tensor, statistics: Statistics, pattern: Pattern
    ) -> Tensor:
        """The new mask, (R, I), True = kept. `weight_RI`: the current pruned weights, fp32. Kept weights that `mask_RI` prunes
        get their values in `dense_RI`; the others keep theirs."""
        raise NotImplementedError


class Dsnot(Refinement):
    """Pruning and regrowing by expected output errors (Zhang et al. 2024, "Dynamic Sparse No Training", section 3)."""

    needs = (MOMENTS,)

    def check(self, pattern: Pattern) -> None:
        group_of(pattern)

    def refine(
        self, dense_RI: Tensor, weight_RI: Tensor, mask_RI: Tensor, statistics: Statistics, pattern: Pattern
    ) -> Tensor:
        return scores.regrow(dense_RI, mask_RI, statistics.moments_3I, group_of(pattern))


class Swaps(Refinement):
    """Exchanges a pruned and a kept weight, always the pair that reduces the output error most (Zimmer et al. 2025,
    SparseSwaps)."""

    needs = (GRAM,)

    def check(self, pattern: Pattern) -> None:
        group_of(pattern)

    def refine(
        self, dense_RI: Tensor, weight_RI: Tensor, mask_RI: Tensor, statistics: Statistics, pattern: Pattern
    ) -> Tensor:
        return swap(dense_RI, weight_RI, mask_RI, statistics.gram_II, group_of(pattern), self.settings.swaps)


def group_of(pattern: Pattern) -> int | None:
    """The number of consecutive inputs among which weights may be exchanged; None: all of the row. `UserError` for a pattern
    of which that is not known."""
    if not isinstance(pattern, Unstructured | NofM):
        raise UserError(
            f"a mask is refined for ratios and N of M, not for {pattern}: set prune.refine=none, and a prune.method that "
            "stands for no refinement, such as wanda"
        )
    return pattern.m if isinstance(pattern, NofM) else None
