"""The optimal-brain-surgeon updates of SparseGPT and its ablations. Pure math, free of torch.distributed.

Shapes: R = rows (of one matrix, or of several with the same input, stacked), I = in_features, B = columns of a block.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.runtime.errors import UserError
from pipeline.sparsity.masks import apply_
from pipeline.sparsity.patterns import NofM

BLOCK = 128  # columns between updates of all later columns (SparseGPT, section 3.3)
ROW_TILE = 512  # rows of a product, see `row_tile`
WIDTH = 32  # columns within a block that are updated one by one, before one product updates the rest of the block


def factor(gram_II: Tensor, damp: float, name: str, say: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse of a damped fp32 Gram matrix, (I, I), and which inputs are dead, (I,).

    Adds `damp` times the mean of the diagonal, and ten times more for as long as the factorisation fails. Sets the diagonal of
    `gram_II` to 1 where it is 0. Raises `UserError` if all attempts fail.
    """
    dead_I = gram_II.diagonal() == 0
    gram_II.diagonal().masked_fill_(dead_I, 1)  # an index by bools would wait for the GPU
    mean = gram_II.diagonal().mean()
    while damp <= 10:
        # With rows and columns reversed, H = V V^T with an upper V, and inverse(V) is the factor: half the work of
        # factorising the inverse, and the condition number is not squared.
        reversed_II = gram_II.flip(0, 1)
        reversed_II.diagonal().add_(damp * mean)
        lower_II, failed = torch.linalg.cholesky_ex(reversed_II)
        factor_II = _inverse(lower_II.flip(0, 1))
        if (failed == 0) & factor_II.isfinite().all():  # read at once
            return factor_II, dead_I
        stronger = max(10 * damp, 1e-4)
        say(f"  {name}: the Gram matrix is singular at damping {damp:g}: trying {stronger:g}")
        damp = stronger
    raise UserError(f"{name}: the Gram matrix is singular at any damping: set a larger calibration.samples")


def _inverse(upper_II: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by halves: a third of the products of solving against the identity."""
    inputs = len(upper_II)
    if inputs <= 2 * BLOCK:
        return torch.linalg.solve_triangular(
            upper_II, torch.eye(inputs, dtype=upper_II.dtype, device=upper_II.device), upper=True
        )
    half = inputs // 2
    inverse_II = torch.zeros_like(upper_II)
    inverse_II[:half, :half] = first = _inverse(upper_II[:half, :half])
    inverse_II[half:, half:] = second = _inverse(upper_II[half:, half:])
    inverse_II[:half, half:] = -(first @ upper_II[:half, half:]) @ second
    return inverse_II


def row_tile(rows_RI: Tensor) -> int | None:
    """The number of rows to multiply at a time; None: all. On a GPU the rounding of a product depends on its shape, and tiles
    give the same shapes on any number of ranks."""
    return ROW_TILE if rows_RI.is_cuda else None


def product(rows_RI: Tensor, matrix_II: Tensor) -> Tensor:
    """rows @ matrix, (R, I), in tiles of rows (see `row_tile`)."""
    tile = row_tile(rows_RI)
    if tile is None:
        return rows_RI @ matrix_II
    return torch.cat([tile_RI @ matrix_II for tile_RI in rows_RI.split(tile)])


@dataclass(frozen=True)
class Score:
    """The importance of updated weights: w^2 / scale if `squared`, else |w| * scale. `scale_I`: fp32, one for each column."""

    scale_I: Tensor
    squared: bool = False

    def __getitem__(self, columns: slice) -> "Score":
        return Score(self.scale_I[columns], self.squared)

    def of(self, weight_RI: Tensor) -> Tensor:
        return weight_RI**2 / self.scale_I if self.squared else weight_RI.abs() * self.scale_I


# prune_block(weight_BR, kept_BR, factor_BB, score, pattern): prunes a block in place and returns its errors, (B, R)
PruneBlock = Callable[[Tensor, Tensor, Tensor, Score | None, NofM | None], Tensor]


def prune_rows(
    weight_RI: Tensor,
    factor_II: Tensor,
    choose: Callable[[Tensor, slice], Tensor] | None,
    score: Score | None = None,
    pattern: NofM | None = None,
    tile: int | None = None,
    prune_block: PruneBlock | None = None,
) -> Tensor:
    """Prunes column by column, in place, compensating each error in the later columns. Returns the mask, (R, I).

    `choose(weight_RB, columns)` returns the mask of a block before its columns are visited. If it is None, `pattern` selects
    by `score` in each group of M columns when the loop reaches it. `tile`: the largest number of rows of a product, so that a
    row's result does not depend on the other rows; None is no limit. `prune_block`: a kernel for blocks of at most `BLOCK`
    columns; None is the loop in torch.
    """
    if choose:
        score = pattern = None  # the mask of a block is given to `prune_block`
    inputs = weight_RI.shape[1]
    block = BLOCK if pattern is None else max(1, BLOCK // pattern.m) * pattern.m
    if prune_block is None or block > BLOCK:
        prune_block = functools.partial(prune_block_by_torch, tile=tile)
    weight_IR = weight_RI.T.contiguous()  # columns are contiguous: every step works on whole columns
    kept_IR = torch.empty_like(weight_IR, dtype=torch.bool)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        columns = slice(start, stop)
        weight_BR, kept_BR = weight_IR[columns], kept_IR[columns]
        if choose:
            kept_BR[:] = choose(weight_BR.T, columns).T
        error_BR = prune_block(weight_BR, kept_BR, factor_II[columns, columns], score and score[columns], pattern)
        _update_later_(weight_IR[stop:], factor_II[columns, stop:], error_BR, tile)
    weight_RI.copy_(weight_IR.T)
    mask_RI = kept_IR.T.contiguous()
    apply_(weight_RI, mask_RI)
    return mask_RI


def prune_block_by_torch(
    weight_BR: Tensor,
    kept_BR: Tensor,
    factor_BB: Tensor,
    score: Score | None,
    pattern: NofM | None,
    tile: int | None = None,
) -> Tensor:
    """Updates the columns of a block in place and returns their errors, (B, R). With a pattern it writes `kept_BR`, without it
    reads it. Pruned weights keep the values of which the errors were computed; the caller zeroes them."""
    width = WIDTH if pattern is None else max(1, WIDTH // pattern.m) * pattern.m
    inverse_B1 = factor_BB.diagonal().reciprocal()[:, None]
    error_BR = torch.empty_like(weight_BR)
    scale_BR = torch.empty_like(weight_BR)  # a weight's error is weight * scale: 0 if it is kept
    if pattern is None:
        torch.mul(~kept_BR, inverse_B1, out=scale_BR)
    for first in range(0, len(weight_BR), width):
        last = min(first + width, len(weight_BR))
        for i in range(first, last):
            if pattern is not None and i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                kept_BR[group] = pattern.select(score[group].of(weight_BR[group].T)).T
                torch.mul(~kept_BR[group], inverse_B1[group], out=scale_BR[group])
            torch.mul(weight_BR[i], scale_BR[i], out=error_BR[i])
            if i + 1 < last:
                weight_BR[i + 1 : last].addr_(factor_BB[i, i + 1 : last], error_BR[i], alpha=-1)
        _update_later_(weight_BR[last:], factor_BB[first:last, last:], error_BR[first:last], tile)
    return error_BR


def _update_later_(weight_CR: Tensor, factor_BC: Tensor, error_BR: Tensor, tile: int | None) -> None:
    """Compensates the errors of a block in the later columns, C."""
    size = tile or max(1, error_BR.shape[1])
    for part_CR, part_BR in zip(weight_CR.split(size, 1), error_BR.split(size, 1)):
        part_CR.addmm_(factor_BC.T, part_BR, alpha=-1)
