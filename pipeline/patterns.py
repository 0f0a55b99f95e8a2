"""Sparsity patterns: which weights of a matrix stay, given their scores. Pure math.

Shapes: O = out_features, I = in_features, G = groups of M consecutive inputs.
A pattern returns the mask it selects (True = kept) and changes nothing.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UserError


@dataclass(frozen=True)
class Unstructured:
    """The lowest `ratio` of the scores go, compared within each output row (Wanda, section 3)."""

    ratio: float

    def __str__(self) -> str:
        return f"{self.ratio:g}"

    def misfit(self, in_features: int) -> str | None:
        return None

    def select(self, score_OI: Tensor) -> Tensor:
        """The first int(I * ratio) of each row in a stable ascending order are pruned."""
        pruned = int(score_OI.shape[1] * self.ratio)
        order_OI = torch.argsort(score_OI, dim=1, stable=True)
        mask_OI = torch.ones_like(score_OI, dtype=torch.bool)
        return mask_OI.scatter_(1, order_OI[:, :pruned], False)

    def violation(self, mask_OI: Tensor) -> str | None:
        """What is wrong with a mask that claims this pattern, or None.

        Only the count over the matrix: a method may compare within rows or over the whole matrix.
        """
        rows, inputs = mask_OI.shape
        pruned = mask_OI.numel() - int(mask_OI.sum())
        allowed = (rows * int(inputs * self.ratio), int(rows * inputs * self.ratio))
        if allowed[0] <= pruned <= allowed[1]:
            return None
        return f"{pruned} of {mask_OI.numel()} weights are pruned, a ratio of {self} means {allowed[1]}"


@dataclass(frozen=True)
class NofM:
    """N of each M consecutive inputs of a row are kept: 2of4, 4of8, 1of4 (which is 75% sparse)."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}of{self.m}"

    @property
    def ratio(self) -> float:
        return 1 - self.n / self.m

    def misfit(self, in_features: int) -> str | None:
        """Why this pattern cannot hold for a matrix with so many inputs, or None.

        A shorter last group could hold no exact N of M, and no kernel would take it: refused, not bent.
        """
        if in_features % self.m:
            return f"{in_features} inputs are not divisible by {self.m}, so {self} cannot hold"
        return None

    def select(self, score_OI: Tensor) -> Tensor:
        """Ties fall as `torch.topk(group, M - N, largest=False)` picks them, as in the published code."""
        score_OGM = score_OI.unflatten(1, (-1, self.m))
        lowest = torch.topk(score_OGM, self.m - self.n, dim=2, largest=False).indices
        mask_OGM = torch.ones_like(score_OGM, dtype=torch.bool)
        return mask_OGM.scatter_(2, lowest, False).flatten(1)

    def violation(self, mask_OI: Tensor) -> str | None:
        kept_OG = mask_OI.unflatten(1, (-1, self.m)).sum(2)
        wrong = (kept_OG != self.n).nonzero()
        if len(wrong) == 0:
            return None
        row, group = wrong[0].tolist()
        return f"{len(wrong)} groups break {self}, the first in row {row}, inputs {group * self.m} to {(group + 1) * self.m - 1}"


Pattern = Unstructured | NofM


def parse(value: str | int | float, key: str = "prune.sparsity") -> Pattern:
    """`0.5` -> Unstructured, `2of4` or `"2:4"` -> NofM; `UserError` naming `key` for all else."""
    if match := re.fullmatch(r"\s*(\d+)\s*(?:of|:)\s*(\d+)\s*", str(value)):
        n, m = map(int, match.groups())
        if not 0 < n < m:
            raise UserError(f"{key}={value}: N of M keeps N of each M weights, so 0 < N < M is needed, as in 2of4")
        return NofM(n, m)
    try:
        ratio = float(value)
    except (ValueError, TypeError):
        raise UserError(f"{key}={value} is not a sparsity: type a ratio such as 0.5, or N of M such as 2of4") from None
    if ratio >= 60 and ratio == int(ratio):
        n, m = divmod(int(ratio), 60)  # YAML 1.1 reads 2:4 in base 60
        raise UserError(f"{key}={value} is not a ratio. YAML reads {n}:{m} as {value}: type {n}of{m}")
    if not 0 < ratio < 1:
        raise UserError(f"{key}={value} is out of range: a ratio lies between 0 and 1, such as 0.5")
    return Unstructured(ratio)
