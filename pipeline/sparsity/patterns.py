"""Sparsity patterns: which weights of a matrix are kept, given their scores. Pure math.

Shapes: O = out_features, I = in_features, G = groups of M consecutive inputs.
A pattern returns a mask (True = kept) and changes nothing. Ties are broken as in the published code.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.registry.patterns import AS_IS, PATTERNS

CHUNK = 64  # rows per task
WIDEST = 16  # largest group that is ranked by comparing all pairs on a GPU
RANKED = 1 << 28  # pairs compared at once: 256 MiB of bools each time


class Pattern:
    """Base class of patterns. `prune.sparsity=./my_pattern.py` uses the one subclass in that file, which may set `label`,
    `description` and `citation` for checks and reports."""

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

    def is_broken(self, mask_OI: Tensor) -> Tensor:
        """Whether `violation` finds something, as a bool on the mask's device where that needs no synchronisation."""
        return torch.tensor(self.violation(mask_OI) is not None)


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
        if not self.is_broken(mask_OI):
            return None
        return f"{1 - mask_OI.count_nonzero().item() / mask_OI.numel():.4f} of the weights are pruned, not {self}"

    def is_broken(self, mask_OI: Tensor) -> Tensor:
        pruned = 1 - mask_OI.count_nonzero().double() / mask_OI.numel()
        return (pruned - self.ratio).abs() > 0.01 + 1 / mask_OI.shape[1]


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
        if score_OI.is_cuda and self.m <= WIDEST:
            return self._by_rank(score_OGM).flatten(1)
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

    def _by_rank(self, score_OGM: Tensor) -> Tensor:
        """For GPUs, whose topk takes a block of threads for each group. Neither this nor its ties need a synchronisation: the
        first of equal scores count as lower, as CUDA's topk picks them."""
        places_M = torch.arange(self.m, device=score_OGM.device)
        earlier_MM = places_M < places_M[:, None]
        parts = []
        for part in score_OGM.split(max(1, RANKED // (score_OGM.shape[1] * self.m**2))):
            mine, other = part[..., :, None], part[..., None, :]
            lower = torch.where(earlier_MM, other <= mine, other < mine).sum(-1, dtype=torch.uint8)
            parts.append(lower >= self.m - self.n)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def violation(self, mask_OI: Tensor) -> str | None:
        wrong = self._wrong(mask_OI).nonzero()
        if len(wrong) == 0:
            return None
        row, group = wrong[0].tolist()
        inputs = f"inputs {group * self.m} to {(group + 1) * self.m - 1}"
        return f"{len(wrong)} groups break {self}, the first in row {row}, {inputs}"

    def is_broken(self, mask_OI: Tensor) -> Tensor:
        return self._wrong(mask_OI).any()

    def _wrong(self, mask_OI: Tensor) -> Tensor:
        """(O, G). Adds M slices: a sum over so short a dimension is many times slower."""
        first, *others = mask_OI.contiguous().view(torch.uint8).unflatten(1, (-1, self.m)).unbind(2)
        kept_OG = first.clone()
        for part in others:
            kept_OG += part
        return kept_OG != self.n


@dataclass(frozen=True)
class AsIs(Pattern):
    """Prunes the weights that are zero already, whatever their number in a row, in a model that another program pruned. The
    scores are magnitudes."""

    def __str__(self) -> str:
        return AS_IS

    def select(self, score_OI: Tensor, whole_matrix: bool = False) -> Tensor:
        return score_OI != 0

    def violation(self, mask_OI: Tensor) -> str | None:
        if not self.is_broken(mask_OI):
            return None
        return 'none of its weights is zero: add {"*NAME*": dense} to prune.overrides if it was not pruned'

    def is_broken(self, mask_OI: Tensor) -> Tensor:
        return mask_OI.all()


def kth_lowest(score_OI: Tensor, k: int) -> Tensor:
    """The k-th lowest score of each row, counted from 1, (O, 1)."""
    k = min(k, score_OI.shape[1])
    if score_OI.is_cuda:
        return _kth_lowest_of_one(score_OI, k) if len(score_OI) == 1 else score_OI.kthvalue(k, keepdim=True).values
    return torch.from_numpy(np.partition(score_OI.float().numpy(), k - 1, axis=1)[:, k - 1 : k])


def _kth_lowest_of_one(score_1I: Tensor, k: int) -> Tensor:
    """On a GPU kthvalue reads each row with one block of threads, so that one long row leaves the rest of the GPU idle; topk
    uses all of it. (1, 1)"""
    from_top = score_1I.shape[1] - k + 1
    if k <= from_top:
        return score_1I.topk(k, largest=False, sorted=False).values.amax(1, keepdim=True)
    return score_1I.topk(from_top, sorted=False).values.amin(1, keepdim=True)


def all_but_lowest(score_OI: Tensor, k: int) -> Tensor:
    """False for the first k of each row in stable ascending order, without sorting."""
    if k == 0:
        return torch.ones_like(score_OI, dtype=torch.bool)
    if score_OI.is_cuda:  # no look for ties first, which would wait for the GPU
        kth_O1 = kth_lowest(score_OI, k)
        return ~_lowest(score_OI, kth_O1, k)
    kept_OI = _above_kth(score_OI.float(), k)
    left = score_OI.shape[1] - k
    if kept_OI.count_nonzero() != left * len(kept_OI):  # ties with the k-th: keep the later ones
        rows = (kept_OI.sum(1) < left).nonzero().squeeze(1)
        kept_OI[rows] = ~_lowest(score_OI[rows], kth_lowest(score_OI[rows], k), k)
    return kept_OI


def _lowest(score_OI: Tensor, kth_O1: Tensor, k: int) -> Tensor:
    """True for the first k of each row in stable ascending order; `kth_O1`: the k-th lowest score."""
    below, tied = score_OI < kth_O1, score_OI == kth_O1
    room_O1 = k - below.sum(1, keepdim=True)
    return below | (tied & (tied.cumsum(1, dtype=torch.int32) <= room_O1))


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
    """`0.5` -> Unstructured, `2of4` or `"2:4"` -> NofM, `as_is` -> AsIs, `./mine.py` -> its pattern. Errors are `UserError`s
    naming `key`."""
    entry, arguments = PATTERNS.parse(value, key)
    return entry.load()(**arguments)
