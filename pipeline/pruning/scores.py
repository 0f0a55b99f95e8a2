"""The formulas of pruning: statistics of inputs, scores, DSnoT's mask, the ratios of allocations, and the output error. Pure
math: no lightning, no accelerate, no torch.distributed.

Shapes: O = out_features, I = in_features, N = tokens, L = layers. A statistic is a sum over tokens, so ranks can add theirs up.
"""

import torch
from torch import Tensor

CYCLES = 50  # exchanges in each row by DSnoT, at most


def square_sum(input_NI: Tensor) -> Tensor:
    """Sum over tokens of the squared inputs, (I,). fp32 within the batch; float64 across batches, so that neither their order
    nor the number of ranks changes a mask."""
    if input_NI.is_cuda:  # one kernel, which reads 16-bit inputs as they are
        return norm_square_sum(input_NI)
    input_NI = input_NI.float()
    return (input_NI * input_NI).sum(0).double()  # 6x faster than a norm over tokens, 300x than einsum (2 cores)


def norm_square_sum(input_NI: Tensor) -> Tensor:
    """`square_sum` without a temporary of the inputs' size."""
    return torch.linalg.vector_norm(input_NI, dim=0, dtype=torch.float32).double().square()


def moments(input_NI: Tensor) -> Tensor:
    """(3, I) in float64: square sum, sum, number of tokens."""
    tokens, inputs = input_NI.shape
    count = torch.full((inputs,), tokens, dtype=torch.float64, device=input_NI.device)
    return torch.stack([square_sum(input_NI), input_NI.sum(0, dtype=torch.float32).double(), count])


def wanda(weight_OI: Tensor, square_sum_I: Tensor) -> Tensor:
    """|W_ij| * ||x_j||_2 (Sun et al. 2023, "A Simple and Effective Pruning Approach for LLMs", eq. 1)."""
    # in place: allocating another tensor costs more than the product
    return weight_OI.abs().float().mul_(square_sum_I.sqrt().float())


def magnitude(weight_OI: Tensor) -> Tensor:
    return weight_OI.float().abs()


def ria(weight_OI: Tensor, square_sum_I: Tensor) -> Tensor:
    """(|W_ij| / sum of column j + |W_ij| / sum of row i) * ||x_j||_2^a: relative importance and activations (Zhang et
    al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for LLMs", eq. 4 and 5; a = 0.5)."""
    weight_OI = weight_OI.float().abs()
    tiny = torch.finfo(torch.float32).tiny  # rows and columns of zeros score 0
    column_I, row_O1 = weight_OI.sum(0).clamp_min(tiny), weight_OI.sum(1, keepdim=True).clamp_min(tiny)
    return (weight_OI / column_I + weight_OI / row_O1) * square_sum_I.sqrt().float() ** 0.5


def select_variant(score_OI: Tensor, ratio: float) -> Tensor:
    """The mask of Wanda's variant (`use_variant` in its code): in each row the lowest scores are pruned while their sum is
    at most alpha times the row's sum. Alpha by bisection from 0.4 in [0, 0.8] until the sparsity is within 0.001 of `ratio`."""
    ascending_OI = torch.sort(score_OI, dim=1, stable=True).values
    running_OI = ascending_OI.cumsum(1)
    total_O1 = score_OI.sum(1, keepdim=True)
    low, alpha, high = 0.0, 0.4, 0.8
    while True:
        last_O1 = (running_OI <= total_O1 * alpha).sum(1, keepdim=True) - 1
        # index -1 (the row's highest score) if not even the lowest score fits, as in the published code
        kept_OI = score_OI > ascending_OI.gather(1, last_O1 % score_OI.shape[1])
        sparsity = 1 - kept_OI.float().mean().item()
        if abs(sparsity - ratio) <= 0.001 or high - low < 0.001:
            return kept_OI
        if sparsity > ratio:
            high, alpha = alpha, (alpha + low) / 2
        else:
            low, alpha = alpha, (alpha + high) / 2


def regrow(weight_OI: Tensor, mask_OI: Tensor, moments_3I: Tensor, group: int | None = None) -> Tensor:
    """Swaps pruned and kept weights while that reduces a row's expected output error; the number of kept weights is unchanged.

    After DSnoT (Zhang et al. 2024, "Dynamic Sparse No Training", section 3): the error of row i is the sum of
    W_ij * mean(x_j) over its pruned weights. Each cycle regrows the pruned weight that reduces the error most, relative to
    the variance of its input, and prunes the kept weight with the lowest Wanda score: among the same `group` consecutive
    inputs, or in the same row. A row stops when the next swap would not bring its error closer to zero.
    """
    square_sum_I, sum_I, count_I = moments_3I
    mean_I = (sum_I / count_I).float()
    spread_I = (square_sum_I / count_I - (sum_I / count_I) ** 2).clamp_min(1e-12).float()
    change_OI = weight_OI.float() * mean_I
    score_OI = wanda(weight_OI, square_sum_I)
    mask_OI = mask_OI.clone()
    group = group or score_OI.shape[1]
    rows = torch.arange(len(mask_OI), device=mask_OI.device)
    start_O = torch.zeros_like(rows)
    error_O = change_OI.masked_fill(mask_OI, 0).sum(1)
    active_O = torch.ones_like(error_O, dtype=torch.bool)
    for _ in range(CYCLES):
        gain_OI = (change_OI * error_O.sign()[:, None] / spread_I).masked_fill(mask_OI, -torch.inf)
        grown_O = gain_OI.argmax(1)
        start_O = grown_O // group * group
        members_OM = start_O[:, None] + torch.arange(group, device=mask_OI.device)
        candidates_OM = score_OI.gather(1, members_OM).masked_fill(~mask_OI.gather(1, members_OM), torch.inf)
        lost_O = start_O + candidates_OM.argmin(1)
        after_O = error_O - change_OI[rows, grown_O] + change_OI[rows, lost_O]
        active_O &= mask_OI[rows, lost_O]  # else none is kept there, as in a row that lost all its weights
        active_O &= after_O.abs() < error_O.abs()
        if not active_O.any():
            break
        changed = rows[active_O]
        mask_OI[changed, grown_O[active_O]] = True
        mask_OI[changed, lost_O[active_O]] = False
        error_O = torch.where(active_O, after_O, error_O)
    return mask_OI


def outlier_share(scores: list[Tensor], times: float) -> float:
    """The share of a layer's scores above `times` their mean (Yin et al. 2024, "Outlier Weighed Layerwise Sparsity", eq. 2)."""
    count = sum(score.numel() for score in scores)
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
    return sum(int((score > times * mean).sum()) for score in scores) / count


def tail_exponent(weight_OI: Tensor) -> float:
    """The Hill estimator of the power-law exponent of the upper half of the eigenvalues of W^T W, 1 or more; lower means a
    heavier tail (Lu et al. 2024, "AlphaPruning", section 3.1)."""
    eigenvalues = torch.linalg.svdvals(weight_OI.float()).square().sort().values
    half = len(eigenvalues) // 2
    upper, threshold = eigenvalues[-half:], eigenvalues[-half - 1]
    tiny = torch.finfo(torch.float32).tiny
    return 1 + half / max((upper.clamp_min(tiny) / threshold.clamp_min(tiny)).log().sum().item(), tiny)


def spread_ratios(values: list[float], ratio: float, spread: float, sizes: list[int] | None = None) -> list[float]:
    """Ratios by layer with the mean `ratio`, within 2 * `spread` of each other: the larger the value, the less is pruned
    (Yin et al. 2024, OWL, section 3.3). `sizes`: weights by layer, over which the mean is taken; None: they are equal."""
    values_L = torch.tensor(values, dtype=torch.float64)
    width = (values_L.max() - values_L.min()).clamp_min(torch.finfo(torch.float64).tiny)
    kept_L = (values_L - values_L.min()) / width * 2 * spread
    if sizes is None or len(set(sizes)) == 1:
        mean = kept_L.mean()  # as in the published code; a weighted mean differs in the last bits
    else:
        size_L = torch.tensor(sizes, dtype=torch.float64)
        mean = (kept_L * size_L).sum() / size_L.sum()
    return (ratio - (kept_L - mean)).tolist()


def relative_error(input_NI: Tensor, dense_OI: Tensor, pruned_OI: Tensor, dense_NI: Tensor | None = None) -> Tensor:
    """||X W^T - X W'^T|| / ||X W^T||, Frobenius, (); the products are computed in the weights' dtype. With the dense model's
    inputs D of the same tokens: ||D W^T - X W'^T|| / ||D W^T||, in fp32."""
    if dense_NI is None:
        dense_NO, error_NO = input_NI @ dense_OI.T, input_NI @ (dense_OI - pruned_OI).T
    else:
        dense_NO = dense_NI.float() @ dense_OI.float().T
        error_NO = dense_NO - input_NI.float() @ pruned_OI.float().T
    return error_NO.float().norm() / dense_NO.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
