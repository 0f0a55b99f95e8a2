"""Exchanges of pruned and kept weights that reduce the output error: by a Triton kernel on a GPU, by torch elsewhere.

Shapes: R = rows (output features), I = in_features, G = groups of M consecutive inputs, C = candidates.
"""

from types import ModuleType

import torch
from torch import Tensor

from pipeline.pruning import obs
from pipeline.runtime.triton_kernels import TritonKernels
from pipeline.sparsity.patterns import NofM

CANDIDATES = 16  # pruned and kept weights each whose pairs are compared in a row without groups; 64 gave the same error
REFRESH = 32  # exchanges after which the products with the Gram matrix are recomputed, to limit rounding errors
SMALLEST = 1e-6  # share of a row's error that an exchange must remove; smaller gains are below fp32 accuracy


def swap(
    dense_RI: Tensor, weight_RI: Tensor, mask_RI: Tensor, gram_II: Tensor, group: int | None, budget: int
) -> Tensor:
    """The mask after at most `budget` exchanges in each row. Each exchange reduces the output error of the row, e G e^T with
    e = dense - weight. If `group` is set, the exchanges stay within groups of `group` consecutive inputs.

    An exchange changes e by s_p at the pruned weight p (to zero) and by s_k at the kept weight k (to the dense weight). This
    changes the error by s_p (2 g_p + s_p G_pp) + s_k (2 g_k + s_k G_kk) + 2 s_p s_k G_pk, with g = e G. The best of all pairs
    within groups is chosen. In a row without groups, the pairs are those of the `CANDIDATES` pruned and the `CANDIDATES` kept
    weights with the smallest s (2 g + s G).
    """
    kernels = KERNELS.on_gpu(dense_RI.device)
    if kernels and kernels.supports(group):
        return swap_by_kernel(kernels, dense_RI, weight_RI, mask_RI, gram_II, group, budget)
    return swap_by_torch(dense_RI, weight_RI, mask_RI, gram_II, group, budget)


def swap_by_torch(
    dense_RI: Tensor, weight_RI: Tensor, mask_RI: Tensor, gram_II: Tensor, group: int | None, budget: int
) -> Tensor:
    weight_RI, mask_RI = weight_RI * mask_RI, mask_RI.clone()
    error_RI = dense_RI - weight_RI
    product_RI = obs.product(error_RI, gram_II)
    diagonal_I = gram_II.diagonal()
    rows_R = torch.arange(len(mask_RI), device=mask_RI.device)  # the rows that may still improve
    find = _best_pair if group is None else _best_pair_in_groups
    for number in range(1, budget + 1):
        step_RI = torch.where(mask_RI[rows_R], weight_RI[rows_R], -error_RI[rows_R])
        alone_RI = step_RI * (2 * product_RI[rows_R] + step_RI * diagonal_I)
        change_R, restored_R, removed_R = find(step_RI, alone_RI, mask_RI[rows_R], gram_II, group)
        better_R = change_R < -SMALLEST * (error_RI[rows_R] * product_RI[rows_R]).sum(1)
        if not better_R.any():
            break
        rows_R, restored_R, removed_R = rows_R[better_R], restored_R[better_R], removed_R[better_R]
        steps_R2 = step_RI[better_R].gather(1, torch.stack([restored_R, removed_R], 1))
        mask_RI[rows_R, restored_R], mask_RI[rows_R, removed_R] = True, False
        weight_RI[rows_R, restored_R], weight_RI[rows_R, removed_R] = dense_RI[rows_R, restored_R], 0.0
        error_RI[rows_R, restored_R], error_RI[rows_R, removed_R] = 0.0, dense_RI[rows_R, removed_R]
        if number % REFRESH == 0:
            product_RI = obs.product(error_RI, gram_II)
        else:
            product_RI[rows_R] += steps_R2[:, :1] * gram_II[restored_R] + steps_R2[:, 1:] * gram_II[removed_R]
    return mask_RI


def swap_by_kernel(
    kernels: ModuleType,
    dense_RI: Tensor,
    weight_RI: Tensor,
    mask_RI: Tensor,
    gram_II: Tensor,
    group: int,
    budget: int,
) -> Tensor:
    """`swap` within groups by the kernel of swap_triton.py. Equal changes of the error may be chosen otherwise."""
    weight_RI, mask_RI = weight_RI * mask_RI, mask_RI.clone()
    done_R = torch.zeros(len(mask_RI), dtype=torch.bool, device=mask_RI.device)
    for made in range(0, budget, REFRESH):
        product_RI = obs.product(dense_RI - weight_RI, gram_II)
        state = (dense_RI, weight_RI, mask_RI, product_RI, gram_II, done_R)
        kernels.swap_in_groups(*state, group, min(REFRESH, budget - made), SMALLEST)
        if done_R.all():
            break
    return mask_RI


def _imported() -> ModuleType:
    from pipeline.pruning import swap_triton  # imports triton

    return swap_triton


def check_kernels(kernels: ModuleType, device: torch.device) -> None:
    """Compares the kernels with torch on a small matrix. Raises `RuntimeError` if the masks differ."""
    generator = torch.Generator().manual_seed(0)
    input_NI, dense_RI = torch.randn(96, 64, generator=generator), torch.randn(32, 64, generator=generator)
    input_NI += input_NI.roll(1, 1)
    mask_RI = NofM(2, 4).select(dense_RI.abs())
    given = (dense_RI, dense_RI, mask_RI, input_NI.T @ input_NI)
    expected = swap_by_torch(*given, 4, REFRESH + 2)
    found = swap_by_kernel(kernels, *(tensor.to(device) for tensor in given), 4, REFRESH + 2)
    if torch.equal(expected, mask_RI) or not torch.equal(found.cpu(), expected):
        raise RuntimeError("a mask that they refined is wrong")


def _best_pair(
    step_RI: Tensor, alone_RI: Tensor, mask_RI: Tensor, gram_II: Tensor, group: None
) -> tuple[Tensor, Tensor, Tensor]:
    """The best exchange in each row: change of the error, pruned weight and kept weight, (R,) each."""
    count = min(CANDIDATES, alone_RI.shape[1])
    pruned_RC = alone_RI.masked_fill(mask_RI, torch.inf).topk(count, 1, largest=False)
    kept_RC = alone_RI.masked_fill(~mask_RI, torch.inf).topk(count, 1, largest=False)
    p_RC, k_RC = pruned_RC.indices, kept_RC.indices
    both_RCC = gram_II[p_RC[:, :, None], k_RC[:, None, :]]
    both_RCC *= 2 * step_RI.gather(1, p_RC)[:, :, None]
    both_RCC *= step_RI.gather(1, k_RC)[:, None, :]
    both_RCC += pruned_RC.values[:, :, None] + kept_RC.values[:, None, :]
    change_R, place_R = both_RCC.flatten(1).min(1)
    p_R1, k_R1 = (place_R // count)[:, None], (place_R % count)[:, None]
    return change_R, p_RC.gather(1, p_R1).squeeze(1), k_RC.gather(1, k_R1).squeeze(1)


def _best_pair_in_groups(
    step_RI: Tensor, alone_RI: Tensor, mask_RI: Tensor, gram_II: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `_best_pair`, among all pairs within groups of `group` inputs."""
    inputs = gram_II.shape[1]
    start_G = torch.arange(0, inputs, group, device=gram_II.device)
    inside_GM = start_G[:, None] + torch.arange(group, device=gram_II.device)
    blocks_GMM = gram_II[inside_GM[:, :, None], inside_GM[:, None, :]]
    step_RGM, alone_RGM = step_RI.unflatten(1, (-1, group)), alone_RI.unflatten(1, (-1, group))
    mask_RGM = mask_RI.unflatten(1, (-1, group))
    pruned_RGM, kept_RGM = alone_RGM.masked_fill(mask_RGM, torch.inf), alone_RGM.masked_fill(~mask_RGM, torch.inf)
    change_RGMM = 2 * step_RGM[..., :, None] * step_RGM[..., None, :] * blocks_GMM
    change_RGMM += pruned_RGM[..., :, None] + kept_RGM[..., None, :]
    change_R, place_R = change_RGMM.flatten(1).min(1)
    start_R = place_R // group**2 * group
    return change_R, start_R + place_R % group**2 // group, start_R + place_R % group


KERNELS = TritonKernels(_imported, check_kernels, "exchanges", "each takes many launches, which is slow")
