"""The optimal-brain-surgeon updates of SparseGPT and its ablations. Pure math: ranks enter as a function argument.

Shapes: R = rows (of one matrix, or of several with the same input, stacked), I = in_features, B = columns of a block,
N = tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.patterns import NofM

BLOCK = 128  # columns whose errors are pushed on at once (SparseGPT, section 3.3)
WIDTH = 32  # columns within a block that are updated one by one, before a product updates the rest of the block


def hessian(input_NI: Tensor) -> Tensor:
    """X^T X, (I, I) in float64. A common factor (SparseGPT: 2/n) changes neither masks nor updates."""
    input_NI = input_NI.float()
    return (input_NI.T @ input_NI).double()


def factor(hessian_II: Tensor, damp: float, name: str, say: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the damped inverse, (I, I) in fp32, and which inputs are dead, (I,).

    Damped by `damp` times the mean of the diagonal; where that is not enough, ten times as much, and so on.
    """
    hessian_II = hessian_II.float()
    dead_I = hessian_II.diagonal() == 0
    hessian_II.diagonal()[dead_I] = 1
    mean = hessian_II.diagonal().mean()
    while damp <= 10:
        damped_II = hessian_II.clone()
        damped_II.diagonal().add_(damp * mean)
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not failed:
            upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
            if not failed and upper_II.isfinite().all():
                return upper_II, dead_I
        more = max(10 * damp, 1e-4)
        say(f"  {name}: the Hessian is singular at damping {damp:g}: trying {more:g}")
        damp = more
    raise UserError(f"{name}: the Hessian stays singular at any damping: more calibration samples are needed")


def prune_rows(
    weight_RI: Tensor,
    factor_II: Tensor,
    choose: Callable[[Tensor, slice], Tensor] | None,
    score: Callable[[Tensor, slice], Tensor],
    pattern: NofM | None,
) -> Tensor:
    """Zeroes weights column by column and pushes each error on to the later columns, in place; returns the mask, (R, I).

    Either `choose(weight_RB, columns)` gives the mask of a block before its columns are visited, or, where it is None,
    `score(weight_RM, columns)` scores each group of M columns when it is reached, and `pattern` selects.
    """
    rows, inputs = weight_RI.shape
    block = BLOCK if choose or pattern is None else max(1, BLOCK // pattern.m) * pattern.m
    width = WIDTH if choose or pattern is None else max(1, WIDTH // pattern.m) * pattern.m
    mask_RI = torch.empty_like(weight_RI, dtype=torch.bool)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        columns = slice(start, stop)
        factor_BB = factor_II[columns, columns]
        inverse_B = factor_BB.diagonal().reciprocal().tolist()
        weight_BR = weight_RI[:, columns].T.contiguous()  # a column is contiguous: every step works on whole columns
        error_BR = torch.empty_like(weight_BR)
        kept_BR = (
            choose(weight_BR.T, columns).T.contiguous() if choose else torch.empty_like(weight_BR, dtype=torch.bool)
        )
        for first in range(0, stop - start, width):
            last = min(first + width, stop - start)
            for i in range(first, last):
                if choose is None and i % pattern.m == 0:
                    group = slice(i, i + pattern.m)
                    score_RM = score(weight_BR[group].T, slice(start + i, start + i + pattern.m))
                    kept_BR[group] = pattern.select(score_RM).T
                error_BR[i] = weight_BR[i].masked_fill(kept_BR[i], 0) * inverse_B[i]
                weight_BR[i] *= kept_BR[i]
                if i + 1 < last:
                    weight_BR[i + 1 : last].addr_(factor_BB[i, i + 1 : last], error_BR[i], alpha=-1)
            weight_BR[last:].addmm_(factor_BB[first:last, last:].T, error_BR[first:last], alpha=-1)
        weight_RI[:, columns] = weight_BR.T
        mask_RI[:, columns] = kept_BR.T
        weight_RI[:, stop:].addmm_(error_BR.T, factor_II[columns, stop:], alpha=-1)
    weight_RI.mul_(mask_RI).add_(0.0)
    return mask_RI
