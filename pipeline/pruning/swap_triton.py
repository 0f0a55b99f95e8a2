"""The exchanges of `swap.swap` within groups: one Triton kernel makes several. In torch each takes 40 launches, and
temporaries of several times the matrix.

Shapes: R = rows, I = inputs, G = groups of M consecutive inputs, C = inputs read at a time. A program is one row; the row's
state stays in the GPU's memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # inputs read at a time: M times as many pairs, in registers
WARPS = 4
WIDEST = 8  # M; a group of 16 has 256 pairs


@triton.jit
def _lower(change, pair, other_change, other_pair):
    is_first = (change < other_change) | ((change == other_change) & (pair < other_pair))
    return tl.where(is_first, change, other_change), tl.where(is_first, pair, other_pair)


@triton.jit
def _best(
    dense, weight, kept, product, diagonal, blocks, inputs, smallest,
    M: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The pair whose exchange reduces the row's error most, as a place in (G, M, M); -1 if none removes more than the share
    `smallest` of the error."""
    best, place, error = float("inf"), -1, 0.0
    for chunk in range(CHUNKS):
        first = chunk * C
        column_C = first + tl.arange(0, C)
        inside_C = column_C < inputs
        dense_C = tl.load(dense + column_C, mask=inside_C, other=0.0)
        weight_C = tl.load(weight + column_C, mask=inside_C, other=0.0)
        product_C = tl.load(product + column_C, mask=inside_C, other=0.0)
        kept_C = tl.load(kept + column_C, mask=inside_C, other=0) != 0
        error_C = dense_C - weight_C
        error += tl.sum(error_C * product_C, 0)
        step_C = tl.where(kept_C, weight_C, -error_C)
        alone_C = step_C * (2 * product_C + step_C * tl.load(diagonal + column_C, mask=inside_C, other=0.0))
        pruned_GM = tl.reshape(tl.where(kept_C | ~inside_C, float("inf"), alone_C), (C // M, M))
        removed_GM = tl.reshape(tl.where(kept_C & inside_C, alone_C, float("inf")), (C // M, M))
        step_GM = tl.reshape(step_C, (C // M, M))
        pair_GMM = first * M + tl.arange(0, C // M)[:, None, None] * M * M
        pair_GMM += tl.arange(0, M)[None, :, None] * M + tl.arange(0, M)[None, None, :]
        both_GMM = tl.load(blocks + pair_GMM, mask=pair_GMM < inputs * M, other=0.0)
        change_GMM = 2 * step_GM[:, :, None] * step_GM[:, None, :] * both_GMM
        change_GMM += pruned_GM[:, :, None] + removed_GM[:, None, :]
        # not tl.argmin of one dimension: Triton reorders what is reshaped for reductions only, and not argmin's indices
        change_GM, pair_GM = tl.reduce((change_GMM, pair_GMM), 2, _lower)
        change_G, pair_G = tl.reduce((change_GM, pair_GM), 1, _lower)
        lowest, lowest_pair = tl.reduce((change_G, pair_G), 0, _lower)
        if lowest < best:
            best, place = lowest, lowest_pair
    if best >= -smallest * error:
        place = -1
    return place


@triton.jit
def _swap_kernel(
    dense, weight, kept, product, gram, diagonal, blocks, done, inputs, exchanges, smallest,
    M: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """At most `exchanges` of the best exchanges in this row; `done` is set when there is none left."""
    row = tl.program_id(0).to(tl.int64)
    dense, weight, kept, product = (
        dense + row * inputs,
        weight + row * inputs,
        kept + row * inputs,
        product + row * inputs,
    )
    number, place = 0, 0
    if tl.load(done + row) != 0:
        place = -1
    while (number < exchanges) & (place >= 0):
        place = _best(dense, weight, kept, product, diagonal, blocks, inputs, smallest, M, C, CHUNKS)
        if place >= 0:
            restored = (place // (M * M)) * M + place % (M * M) // M
            removed = (place // (M * M)) * M + place % M
            restored_to, removed_from = tl.load(dense + restored), tl.load(weight + removed)
            step = tl.load(weight + restored) - restored_to
            for chunk in range(CHUNKS):
                column_C = chunk * C + tl.arange(0, C)
                inside_C = column_C < inputs
                change_C = step * tl.load(gram + restored.to(tl.int64) * inputs + column_C, mask=inside_C, other=0.0)
                change_C += removed_from * tl.load(
                    gram + removed.to(tl.int64) * inputs + column_C, mask=inside_C, other=0.0
                )
                before_C = tl.load(product + column_C, mask=inside_C, other=0.0)
                tl.store(product + column_C, before_C + change_C, mask=inside_C)
            tl.debug_barrier()  # all threads have read the weights that change now
            tl.store(weight + restored, restored_to)
            tl.store(weight + removed, 0.0)
            tl.store(kept + restored, 1)
            tl.store(kept + removed, 0)
            tl.debug_barrier()  # other threads read them next
        number += 1
    if place < 0:
        tl.store(done + row, 1)


def supports(group: int | None) -> bool:
    return group is not None and group <= WIDEST and group & (group - 1) == 0


def chunks(inputs: int) -> tuple[int, int]:
    """How many inputs are read at a time, a power of two, and how often."""
    columns = min(CHUNK, triton.next_power_of_2(inputs))
    return columns, triton.cdiv(inputs, columns)


def swap_in_groups(
    dense_RI: Tensor,
    weight_RI: Tensor,
    mask_RI: Tensor,
    product_RI: Tensor,
    gram_II: Tensor,
    done_R: Tensor,
    group: int,
    exchanges: int,
    smallest: float,
) -> None:
    """Makes at most `exchanges` exchanges in each row that is not done, in `weight_RI`, `mask_RI`, `product_RI` and `done_R`
    (bool), which are contiguous. All other tensors are fp32."""
    rows, inputs = dense_RI.shape
    assert supports(group) and inputs % group == 0
    assert all(tensor.is_contiguous() for tensor in (weight_RI, mask_RI, product_RI, done_R))
    start_G1 = torch.arange(0, inputs, group, device=gram_II.device)[:, None]
    inside_GM = start_G1 + torch.arange(group, device=gram_II.device)
    blocks_GMM = gram_II[inside_GM[:, :, None], inside_GM[:, None, :]].contiguous()
    columns, count = chunks(inputs)
    with torch.cuda.device_of(dense_RI):
        _swap_kernel[(rows,)](
            *(dense_RI.contiguous(), weight_RI, mask_RI.view(torch.uint8), product_RI, gram_II.contiguous()),
            *(gram_II.diagonal().contiguous(), blocks_GMM, done_R.view(torch.uint8), inputs, exchanges, smallest),
            M=group,
            C=columns,
            CHUNKS=count,
            num_warps=WARPS,
        )
