"""Sparsity patterns: which weights of a matrix are kept, given their scores. Pure math.

Shapes: O = out_features, I = in_features, G = groups of M consecutive inputs.
A pattern returns a mask (True = kept) and changes nothing. Ties are broken as in the published code.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.registry.patterns import PATTERNS

CHUNK = 64  # rows per task


class Pattern:
    """Base class of patterns. `prune.sparsity=./my_pattern.py` uses the one subclass in that file, whose attributes `label`,
    `description` and `citation` say what it is called."""

    ratio: float  # share of the weights that is pruned

    def __str__(self) -> str:
        return type(self).__name__

    def select(self, score_OI: Tensor, whole_matrix: bool = False) -> Tensor:
        """The mask (O, I). `whole_matrix`: compare scores over the matrix, not within each row."""
        raise NotImplementedError

    def misfit(self, in_features: int) -> str | None:
        """Why this pattern does not fit a matrix with `in_features` inputs, or None."""
        return None

    def violation(self, mask_OI: Tensor) -> str | None:
        """What is wrong with a mask that claims this pattern, or None."""
        return None


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Prunes the share `ratio` with the lowest scores, per output row (Wanda, section 3) or over the whole matrix."""

    ratio: float

    def __str__(self) -> str:
        return f"{self.ratio:g}"

    def select(self, score_OI: Tensor, whole_matrix: bool = False) -> Tensor:
        """Per row: prunes the first int(I * ratio) in stable ascending order. Over the matrix: prunes all scores up to
        and including the one at index int(O * I * ratio), as in the published magnitude and SparseGPT code."""
        if whole_matrix:
            return score_OI > kth_lowest(score_OI.reshape(1, -1), int(score_OI.numel() * self.ratio) + 1)
        return all_but_lowest(score_OI, int(score_OI.shape[1] * self.ratio))

    def violation(self, mask_OI: Tensor) -> str | None:
        # methods round differently: per row, per matrix, per column block, or to a tolerance
        pruned = 1 - mask_OI.count_nonzero().item() / mask_OI.numel()
        if abs(pruned - self.ratio) <= 0.01 + 1 / mask_OI.shape[1]:
            return None
        return f"{pruned:.4f} of the weights are pruned, not {self}"


@dataclass(frozen=True)
class NofM(Pattern):
    """Keeps N of each M consecutive inputs in a row: 2of4, 4of8, 1of4 (75% sparse)."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}of{self.m}"

    @property
    def ratio(self) -> float:
        return 1 - self.n / self.m

    def misfit(self, in_features: int) -> str | None:
        """A shorter last group is refused: it could not hold N of M, and no kernel would accept it."""
        if in_features % self.m:
            return f"{in_features} inputs are not divisible by {self.m}, so {self} does not fit"
        return None

    def select(self, score_OI: Tensor, whole_matrix: bool = False) -> Tensor:
        """Ties are broken as by `torch.topk(group, M - N, largest=False)`."""
        score_OGM = score_OI.unflatten(1, (-1, self.m))
        if (self.n, self.m) != (2, 4):
            return self._by_topk(score_OGM).flatten(1)
        # fast path: keep what is at least the second highest of four; ties keep too many and are redone by topk
        mask_OGM = score_OGM >= _second_of_four(score_OGM)
        if mask_OGM.count_nonzero() != mask_OGM.numel() // 2:
            tied_OG = sum(part.to(torch.uint8) for part in mask_OGM.unbind(2)) != 2
            mask_OGM[tied_OG] = self._by_topk(score_OGM[tied_OG])
        return mask_OGM.flatten(1)

    def _by_topk(self, score: Tensor) -> Tensor:
        """(..., M) -> (..., M)"""
        lowest = torch.topk(score, self.m - self.n, dim=-1, largest=False).indices
        return torch.ones_like(score, dtype=torch.bool).scatter_(-1, lowest, False)

    def violation(self, mask_OI: Tensor) -> str | None:
        # add M slices: a sum over so short a dimension is many times slower
        kept_OG = sum(part.to(torch.uint8) for part in mask_OI.unflatten(1, (-1, self.m)).unbind(2))
        wrong = (kept_OG != self.n).nonzero()
        if len(wrong) == 0:
            return None
        row, group = wrong[0].tolist()
        inputs = f"inputs {group * self.m} to {(group + 1) * self.m - 1}"
        return f"{len(wrong)} groups break {self}, the first in row {row}, {inputs}"


def kth_lowest(score_OI: Tensor, k: int) -> Tensor:
    """The k-th lowest score of each row, counted from 1, (O, 1)."""
    k = min(k, score_OI.shape[1])
    if score_OI.is_cuda:
        return torch.kthvalue(score_OI, k, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(score_OI.float().numpy(), k - 1, axis=1)[:, k - 1 : k])


def all_but_lowest(score_OI: Tensor, k: int) -> Tensor:
    """False for the first k of each row in stable ascending order, without sorting."""
    if k == 0:
        return torch.ones_like(score_OI, dtype=torch.bool)
    kept_OI = score_OI > kth_lowest(score_OI, k) if score_OI.is_cuda else _above_kth(score_OI.float(), k)
    left = score_OI.shape[1] - k
    if kept_OI.count_nonzero() != left * len(kept_OI):  # ties with the k-th: keep the later ones
        rows = (kept_OI.sum(1) < left).nonzero().squeeze(1)
        kth_O1 = kth_lowest(score_OI[rows], k)
        below, tied = score_OI[rows] < kth_O1, score_OI[rows] == kth_O1
        room_O1 = k - below.sum(1, keepdim=True)
        kept_OI[rows] = ~(below | (tied & (tied.cumsum(1) <= room_O1)))
    return kept_OI


def _above_kth(score_OI: Tensor, k: int) -> Tensor:
    """numpy's partition is several times faster than torch's kthvalue, which is faster than a sort. It releases the GIL, so
    threads share the rows; small chunks stay in the cache."""
    score, above = score_OI.numpy(), np.empty(score_OI.shape, dtype=bool)

    def work(rows: slice) -> None:
        kth = np.partition(score[rows], k - 1, axis=1)[:, k - 1 : k]
        np.greater(score[rows], kth, out=above[rows])

    chunks = [slice(start, start + CHUNK) for start in range(0, len(score), CHUNK)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, chunks))
    return torch.from_numpy(above)


def _second_of_four(score_OG4: Tensor) -> Tensor:
    """The second highest of each group, (O, G, 1)."""
    a, b, c, d = score_OG4.unbind(2)
    high_1, low_1 = torch.maximum(a, b), torch.minimum(a, b)
    high_2, low_2 = torch.maximum(c, d), torch.minimum(c, d)
    return torch.maximum(torch.minimum(high_1, high_2), torch.maximum(low_1, low_2)).unsqueeze(2)


def parse(value: str | int | float, key: str = "prune.sparsity") -> Pattern:
    """`0.5` -> Unstructured, `2of4` or `"2:4"` -> NofM, `./mine.py` -> its pattern. Errors are `UserError`s naming `key`."""
    entry, arguments = PATTERNS.parse(value, key)
    return entry.load()(**arguments)
