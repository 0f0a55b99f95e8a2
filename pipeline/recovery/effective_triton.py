"""Triton kernels for effective.py. In torch an effective weight takes 13 launches, which read and write about 38 bytes per
weight in bf16; the kernel reads and writes 4.1.

Shapes as in effective.py; a program computes a tile of HEIGHT x WIDTH.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEIGHT, WIDTH, RANKS = 32, 128, 16  # of a tile; ranks multiplied at a time, at least 16
BLOCK = 2048  # numbers per program of `mask_`
WARPS = 4


@triton.jit
def _kept(bits, place, inside):
    """The mask's bits at the flat indices `place`, as 0 or 1."""
    return (tl.load(bits + (place >> 3), mask=inside, other=0).to(tl.int32) >> (place & 7).to(tl.int32)) & 1


@triton.jit
def _effective_kernel(
    base, left, right, bits, out, wrong, rows, columns, rank, scale,
    base_e, base_p, base_q, left_e, left_p, left_r, right_e, right_r, right_q,
    HAS_BASE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The names with a suffix, such as `base_p`, are strides."""
    expert = tl.program_id(2).to(tl.int64)
    row_P = (tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)
    column_Q = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    inside_PQ = (row_P < rows)[:, None] & (column_Q < columns)[None, :]
    product_PQ = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for chunk in range(CHUNKS):
        rank_R = chunk * RANKS + tl.arange(0, RANKS)
        left_PR = tl.load(
            left + expert * left_e + row_P[:, None] * left_p + rank_R[None, :] * left_r,
            mask=(row_P < rows)[:, None] & (rank_R < rank)[None, :],
            other=0.0,
        ).to(tl.float32)
        right_RQ = tl.load(
            right + expert * right_e + rank_R[:, None] * right_r + column_Q[None, :] * right_q,
            mask=(rank_R < rank)[:, None] & (column_Q < columns)[None, :],
            other=0.0,
        ).to(tl.float32)
        product_PQ = tl.dot(left_PR, right_RQ, product_PQ, input_precision="ieee")
    sum_PQ = product_PQ * scale
    if HAS_BASE:
        at_PQ = expert * base_e + row_P[:, None] * base_p + column_Q[None, :] * base_q
        sum_PQ += tl.load(base + at_PQ, mask=inside_PQ, other=0.0).to(tl.float32)
    place_PQ = expert * rows * columns + row_P[:, None] * columns + column_Q[None, :]
    rounded_PQ = sum_PQ.to(out.dtype.element_ty).to(tl.float32)  # may overflow
    kept_PQ = _kept(bits, place_PQ, inside_PQ)
    masked_PQ = rounded_PQ * kept_PQ.to(tl.float32) + 0.0  # +0.0: no weight is -0.0
    tl.store(out + place_PQ, masked_PQ.to(out.dtype.element_ty), mask=inside_PQ)
    # infinity and NaN times zero are NaN
    nonzero_PQ = (masked_PQ != 0) & (kept_PQ == 0) & inside_PQ
    count = tl.sum(tl.sum(nonzero_PQ.to(tl.int32), 1), 0)
    if count > 0:
        tl.atomic_add(wrong, count)


@triton.jit
def _mask_kernel(values, bits, wrong, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    kept = _kept(bits, place, inside)
    masked = tl.load(values + place, mask=inside, other=0.0).to(tl.float32) * kept.to(tl.float32) + 0.0
    tl.store(values + place, masked.to(values.dtype.element_ty), mask=inside)
    count = tl.sum(((masked != 0) & (kept == 0) & inside).to(tl.int32), 0)
    if count > 0:
        tl.atomic_add(wrong, count)


def effective(
    base: Tensor | None, left: Tensor, right: Tensor, mask_bits: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See effective.py."""
    *experts, rows, rank = left.shape
    columns = right.shape[-1]
    out = torch.empty(*experts, rows, columns, dtype=(left if base is None else base).dtype, device=left.device)
    wrong = torch.zeros((), dtype=torch.int32, device=left.device)
    strides = [stride for factor in (out if base is None else base, left, right) for stride in _strides(factor)]
    grid = (triton.cdiv(rows, HEIGHT), triton.cdiv(columns, WIDTH), experts[0] if experts else 1)
    with torch.cuda.device_of(left):
        _effective_kernel[grid](
            *(out if base is None else base, left, right, mask_bits, out, wrong, rows, columns, rank, scale, *strides),
            HAS_BASE=base is not None,
            HEIGHT=HEIGHT,
            WIDTH=WIDTH,
            RANKS=RANKS,
            CHUNKS=triton.cdiv(rank, RANKS),
            num_warps=WARPS,
        )
    return out, wrong


def _strides(matrices: Tensor) -> tuple[int, ...]:
    return matrices.stride() if matrices.dim() == 3 else (0, *matrices.stride())


def mask_(tensor: Tensor, mask_bits: Tensor) -> Tensor:
    """See effective.py. `tensor` is contiguous."""
    wrong = torch.zeros((), dtype=torch.int32, device=tensor.device)
    with torch.cuda.device_of(tensor):
        grid = (triton.cdiv(tensor.numel(), BLOCK),)
        _mask_kernel[grid](tensor, mask_bits, wrong, tensor.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return wrong
