"""The columns of one block of `obs.prune_rows` in one Triton kernel: torch needs several launches for each column.

Shapes: R = rows, B = columns of the block, (B, R) in memory. A program is one warp with `ROWS` rows and all columns, in
registers; a row's result depends on nothing but the row. One column is read as the sum over all columns, with the others
replaced by 0, which is exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.pruning.obs import BLOCK, Score
from pipeline.sparsity.patterns import NofM

ROWS = 8  # of a program: 32 weights in each thread, and enough programs for a GPU from 4096 rows on


@triton.jit
def _select(weight_BR, kept_BR, scale_B1, column_B1, first, N: tl.constexpr, M: tl.constexpr, SQUARED: tl.constexpr):
    """`kept_BR` (0 or 1) with the group of M columns from `first` on: the N highest scores, and the later ones of equals."""
    if SQUARED:
        score_BR = tl.div_rn(weight_BR * weight_BR, tl.broadcast_to(scale_B1, weight_BR.shape))  # rounded as by torch
    else:
        score_BR = tl.abs(weight_BR) * scale_B1
    lower_BR = tl.zeros(weight_BR.shape, tl.int32)  # the number of lower scores in the group
    for i in range(M):
        other_R = tl.sum(tl.where(column_B1 == first + i, score_BR, 0.0), 0)[None, :]
        lower_BR += ((other_R < score_BR) | ((other_R == score_BR) & (first + i < column_B1))).to(tl.int32)
    in_group_B1 = (column_B1 >= first) & (column_B1 < first + M)
    return tl.where(in_group_B1, (lower_BR >= M - N).to(tl.int32), kept_BR)


@triton.jit
def _block_kernel(
    weight, kept, factor, inverse, scale, error, rows, columns,
    SELECTS: tl.constexpr, SQUARED: tl.constexpr, N: tl.constexpr, M: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """`inverse` (columns,): of the diagonal of `factor` (columns, columns). `kept` (uint8) is written if SELECTS, else read."""
    row_R, column_B = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, B)
    column_B1, inside_B, inside_R = column_B[:, None], column_B < columns, row_R < rows
    inside_BR, offset_BR = inside_B[:, None] & inside_R[None, :], column_B1 * rows + row_R[None, :]
    weight_BR = tl.load(weight + offset_BR, mask=inside_BR, other=0.0)
    kept_BR = tl.zeros((B, R), tl.int32)
    scale_B1 = tl.full((B, 1), 1.0, tl.float32)
    if SELECTS:
        scale_B1 = tl.load(scale + column_B, mask=inside_B, other=1.0)[:, None]
    else:
        kept_BR = tl.load(kept + offset_BR, mask=inside_BR, other=1).to(tl.int32)
    for i in range(B):  # past `columns` weights and errors are 0; the interpreter needs a constant
        if SELECTS:  # noqa: SIM102 decided by the compiler
            if i % M == 0:
                kept_BR = _select(weight_BR, kept_BR, scale_B1, column_B1, i, N, M, SQUARED)
        pruned_R = tl.sum(tl.where((column_B1 == i) & (kept_BR == 0), weight_BR, 0.0), 0)
        # no scalar: the interpreter of Triton 3.9 refuses one as a mask
        stored_R = inside_R & (row_R * 0 + i < columns)
        error_R = pruned_R * tl.load(inverse + i + row_R * 0, mask=stored_R, other=0.0)
        tl.store(error + i * rows + row_R, error_R, mask=stored_R)
        # later columns only; a product with 0 leaves the others as they are
        factor_B = tl.load(factor + i * columns + column_B, mask=inside_B & (i < column_B), other=0.0)
        weight_BR = tl.fma(
            tl.broadcast_to(-factor_B[:, None], (B, R)), tl.broadcast_to(error_R[None, :], (B, R)), weight_BR
        )
    tl.store(weight + offset_BR, weight_BR, mask=inside_BR)
    if SELECTS:
        tl.store(kept + offset_BR, kept_BR.to(tl.uint8), mask=inside_BR)


def prune_block(
    weight_BR: Tensor, kept_BR: Tensor, factor_BB: Tensor, score: Score | None, pattern: NofM | None
) -> Tensor:
    """As `obs.prune_block_by_torch`, for at most `BLOCK` columns. `weight_BR` (fp32) and `kept_BR` (bool): contiguous."""
    columns, rows = weight_BR.shape
    assert columns <= BLOCK and weight_BR.dtype == torch.float32
    assert weight_BR.is_contiguous() and kept_BR.is_contiguous()
    error_BR = torch.empty_like(weight_BR)
    inverse_B = factor_BB.diagonal().reciprocal()
    # without a score the kernel does not read the scale, but it needs a pointer
    scale_B = inverse_B if score is None else score.scale_I.contiguous()
    with torch.cuda.device_of(weight_BR):
        _block_kernel[(triton.cdiv(rows, ROWS),)](
            *(weight_BR, kept_BR.view(torch.uint8), factor_BB.contiguous(), inverse_B, scale_B, error_BR),
            *(rows, columns),
            SELECTS=pattern is not None,
            SQUARED=score is not None and score.squared,
            N=pattern.n if pattern else 1,
            M=pattern.m if pattern else 1,
            R=ROWS,
            B=BLOCK,
            num_warps=1,
        )
    return error_BR
