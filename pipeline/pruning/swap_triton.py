"""The exchanges of `swap.swap`: one Triton kernel makes several. In torch each takes 40 launches, and temporaries of several
times the matrix.

Shapes: R = rows, I = inputs, G = groups of M consecutive inputs, C = inputs read at a time, K = candidates. A program is one
row; the row's state stays in the GPU's memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.pruning.swap import CANDIDATES

CHUNK = 1024  # inputs read at a time: M times as many pairs, in registers
WARPS = 4
WIDEST = 8  # M; a group of 16 has 256 pairs
LONGEST = 16384  # inputs of a row without groups, which is read at once: 32 inputs for each thread of 16 warps


@triton.jit
def _lower(change, pair, other_change, other_pair):
    is_first = (change < other_change) | ((change == other_change) & (pair < other_pair))
    return tl.where(is_first, change, other_change), tl.where(is_first, pair, other_pair)


@triton.jit
def _alone(value, weight, kept, product, diagonal, column_C, inside_C):
    """The step of each weight, and how that step alone changes the row's error: for the pruned weights (infinite elsewhere)
    and for the kept ones (infinite elsewhere)."""
    weight_C = tl.load(weight + column_C, mask=inside_C, other=0.0)
    product_C = tl.load(product + column_C, mask=inside_C, other=0.0)
    kept_C = tl.load(kept + column_C, mask=inside_C, other=0) != 0
    step_C = tl.where(kept_C, weight_C, -tl.load(value + column_C, mask=inside_C, other=0.0))
    alone_C = step_C * (2 * product_C + step_C * tl.load(diagonal + column_C, mask=inside_C, other=0.0))
    pruned_C = tl.where(kept_C | ~inside_C, float("inf"), alone_C)
    return step_C, pruned_C, tl.where(kept_C & inside_C, alone_C, float("inf"))


@triton.jit
def _best(
    value, weight, kept, product, diagonal, blocks, inputs,
    M: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The best pair within groups: the pruned and the kept input, and how the exchange changes the row's error."""
    best, place = float("inf"), 0
    for chunk in range(CHUNKS):
        first = chunk * C
        column_C = first + tl.arange(0, C)
        step_C, pruned_C, removed_C = _alone(value, weight, kept, product, diagonal, column_C, column_C < inputs)
        pruned_GM, removed_GM = tl.reshape(pruned_C, (C // M, M)), tl.reshape(removed_C, (C // M, M))
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
    group = (place // (M * M)) * M
    return group + place % (M * M) // M, group + place % M, best


@triton.jit
def _lowest(change_C, column_C, K: tl.constexpr):
    """The inputs with the K lowest changes, and these."""
    place_K = tl.arange(0, K)
    lowest_K, column_K = tl.full((K,), float("inf"), tl.float32), tl.zeros((K,), tl.int32)
    for place in range(K):
        lowest, column = tl.reduce((change_C, column_C), 0, _lower)
        lowest_K = tl.where(place_K == place, lowest, lowest_K)
        column_K = tl.where(place_K == place, column, column_K)
        change_C = tl.where(column_C == column, float("inf"), change_C)
    return lowest_K, column_K


@triton.jit
def _best_of_candidates(
    value, weight, kept, product, gram, diagonal, inputs, K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The same, of the pairs of the K best pruned and the K best kept weights of the row."""
    column_C = tl.arange(0, C)
    _, pruned_C, removed_C = _alone(value, weight, kept, product, diagonal, column_C, column_C < inputs)
    pruned_K, p_K = _lowest(pruned_C, column_C, K)
    removed_K, k_K = _lowest(removed_C, column_C, K)
    both_KK = tl.load(gram + p_K.to(tl.int64)[:, None] * inputs + k_K[None, :])
    change_KK = -2 * tl.load(value + p_K)[:, None] * tl.load(weight + k_K)[None, :] * both_KK
    change_KK += pruned_K[:, None] + removed_K[None, :]
    pair_KK = p_K[:, None] * inputs + k_K[None, :]
    change_K, pair_K = tl.reduce((change_KK, pair_KK), 1, _lower)
    best, pair = tl.reduce((change_K, pair_K), 0, _lower)
    return pair // inputs, pair % inputs, best


@triton.jit
def _swap_kernel(
    value, weight, kept, product, error, gram, diagonal, blocks, done, inputs, exchanges, smallest,
    M: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """At most `exchanges` of the best exchanges in this row; `done` is set when none removes more than the share `smallest` of
    the row's error. M = 0: without groups."""
    row = tl.program_id(0).to(tl.int64)
    value, weight, kept, product = (
        value + row * inputs,
        weight + row * inputs,
        kept + row * inputs,
        product + row * inputs,
    )
    number, better, left = 0, tl.load(done + row) == 0, tl.load(error + row)
    while (number < exchanges) & better:
        if M:
            restored, removed, change = _best(value, weight, kept, product, diagonal, blocks, inputs, M, C, CHUNKS)
        else:
            restored, removed, change = _best_of_candidates(value, weight, kept, product, gram, diagonal, inputs, K, C)
        better = change < -smallest * left
        if better:
            left = tl.maximum(left + change, 0.0)
            restored_to, removed_from = tl.load(value + restored), tl.load(weight + removed)
            tl.debug_barrier()  # all threads have read the products and weights that change now
            for chunk in range(CHUNKS):
                column_C = chunk * C + tl.arange(0, C)
                inside_C = column_C < inputs
                change_C = -restored_to * tl.load(
                    gram + restored.to(tl.int64) * inputs + column_C, mask=inside_C, other=0.0
                )
                change_C += removed_from * tl.load(
                    gram + removed.to(tl.int64) * inputs + column_C, mask=inside_C, other=0.0
                )
                before_C = tl.load(product + column_C, mask=inside_C, other=0.0)
                tl.store(product + column_C, before_C + change_C, mask=inside_C)
            tl.store(weight + restored, restored_to)
            tl.store(weight + removed, 0.0)
            tl.store(kept + restored, 1)
            tl.store(kept + removed, 0)
            tl.debug_barrier()  # other threads read them next
        number += 1
    if not better:
        tl.store(done + row, 1)


def supports(inputs: int, group: int | None) -> bool:
    return inputs <= LONGEST if group is None else group <= WIDEST and group & (group - 1) == 0


def sizes(inputs: int, group: int | None) -> dict[str, int]:
    """The constants of the kernel for rows of so many inputs."""
    columns = triton.next_power_of_2(inputs)
    if group is None:
        warps = min(16, max(WARPS, columns // CHUNK))
        return {
            "M": 0,
            "C": columns,
            "CHUNKS": 1,
            "K": triton.next_power_of_2(min(CANDIDATES, inputs)),
            "num_warps": warps,
        }
    columns = min(CHUNK, columns)
    return {"M": group, "C": columns, "CHUNKS": triton.cdiv(inputs, columns), "K": 0, "num_warps": WARPS}


def exchange(
    value_RI: Tensor,
    weight_RI: Tensor,
    mask_RI: Tensor,
    product_RI: Tensor,
    error_R: Tensor,
    gram_II: Tensor,
    done_R: Tensor,
    group: int | None,
    exchanges: int,
    smallest: float,
) -> None:
    """Makes at most `exchanges` exchanges in each row that is not done, in `weight_RI`, `mask_RI`, `product_RI` and `done_R`
    (bool), which are contiguous. All other tensors are fp32."""
    rows, inputs = value_RI.shape
    assert supports(inputs, group) and inputs % (group or 1) == 0
    assert all(tensor.is_contiguous() for tensor in (weight_RI, mask_RI, product_RI, error_R, done_R))
    gram_II = gram_II.contiguous()
    blocks_GMM = gram_II  # not read without groups
    if group is not None:
        inside_GM = torch.arange(inputs, device=gram_II.device).view(-1, group)
        blocks_GMM = gram_II[inside_GM[:, :, None], inside_GM[:, None, :]].contiguous()
    with torch.cuda.device_of(value_RI):
        _swap_kernel[(rows,)](
            *(value_RI.contiguous(), weight_RI, mask_RI.view(torch.uint8), product_RI, error_R, gram_II),
            *(gram_II.diagonal().contiguous(), blocks_GMM, done_R.view(torch.uint8), inputs, exchanges, smallest),
            **sizes(inputs, group),
        )
