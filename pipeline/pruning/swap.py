"""Exchanges of pruned and kept weights that reduce the output error: by a Triton kernel on a GPU, by torch elsewhere.

Shapes: R = rows (output features), I = in_features, G = groups of M consecutive inputs, C = candidates.
"""

import functools
import itertools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from pipeline.pruning import obs
from pipeline.runtime.triton_kernels import TritonKernels
from pipeline.sparsity.patterns import NofM, Unstructured

CANDIDATES = 16  # pruned and kept weights each whose pairs are compared in a row without groups; 64 gave the same error
REFRESH = 32  # exchanges after which the products with the Gram matrix are recomputed, to limit rounding errors
SMALLEST = 1e-6  # share of a row's error that an exchange must remove; smaller gains are below fp32 accuracy
TILE = 1 << 17  # weights that each core works on at a time, so that the state of their rows stays in its cache

# exchange(value_RI, weight_RI, mask_RI, product_RI, error_R, gram_II, done_R, group, exchanges, smallest): makes at most
# `exchanges` exchanges in each row that is not done, in the weights and the mask; sets `done_R` where none is left. `value_RI`:
# what a weight is when it is kept; `product_RI`, `error_R`: g = e G and e G e^T before these exchanges
Exchange = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int | None, int, float], None]


def swap(
    dense_RI: Tensor,
    weight_RI: Tensor,
    mask_RI: Tensor,
    gram_II: Tensor,
    group: int | None,
    budget: int,
    exchange: Exchange | None = None,
) -> Tensor:
    """The mask after at most `budget` exchanges in each row. Each exchange reduces the output error of the row, e G e^T with
    e = dense - weight. A restored weight gets its dense value, or the one in `weight_RI` if it was kept there. If `group` is
    set, the exchanges stay within groups of `group` consecutive inputs. `exchange`: by default the kernel for `group` on a GPU
    that can run it, else torch; where changes of the error are equal, the two may choose differently.

    An exchange changes e by s_p at the pruned weight p, where -s_p is its value when kept, and by s_k at the kept weight k (to
    the dense weight). This changes the error by s_p (2 g_p + s_p G_pp) + s_k (2 g_k + s_k G_kk) + 2 s_p s_k G_pk, with g = e G.
    The best of all pairs within groups is chosen. In a row without groups, the pairs are those of the `CANDIDATES` pruned and
    the `CANDIDATES` kept weights with the smallest s (2 g + s G).
    """
    if exchange is None:
        kernels = (IN_ROWS if group is None else IN_GROUPS).on_gpu(dense_RI.device)
        is_supported = kernels and kernels.supports(dense_RI.shape[1], group)
        exchange = kernels.exchange if is_supported else exchange_by_torch
    value_RI = torch.where(mask_RI, weight_RI, dense_RI)
    weight_RI, mask_RI = weight_RI * mask_RI, mask_RI.clone()
    done_R = torch.zeros(len(mask_RI), dtype=torch.bool, device=mask_RI.device)
    for made in range(0, budget, REFRESH):
        error_RI = dense_RI - weight_RI
        product_RI = obs.product(error_RI, gram_II)
        # not below zero by rounding, where an exchange that adds error would do
        error_R = _output_error(error_RI, product_RI).clamp_min(0)
        state = (value_RI, weight_RI, mask_RI, product_RI, error_R, gram_II, done_R)
        exchange(*state, group, min(REFRESH, budget - made), SMALLEST)
        if done_R.all():
            break
    return mask_RI


def exchange_by_torch(
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
    find = _BestPair(gram_II) if group is None else _BestPairInGroups(gram_II, group)
    rows = len(value_RI) if value_RI.is_cuda else max(1, TILE * torch.get_num_threads() // value_RI.shape[1])
    tensors = (value_RI, weight_RI, mask_RI, product_RI, error_R, done_R)
    for tile in zip(*(tensor.split(rows) for tensor in tensors)):
        _exchange(*tile, gram_II, find, exchanges, smallest)


def _exchange(
    value_RI: Tensor,
    weight_RI: Tensor,
    mask_RI: Tensor,
    product_RI: Tensor,
    error_R: Tensor,
    done_R: Tensor,
    gram_II: Tensor,
    find: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    exchanges: int,
    smallest: float,
) -> None:
    diagonal_I = gram_II.diagonal()
    rows_R = torch.where(~done_R)[0]  # the rows that may still improve; what follows are copies of these
    value, weight, mask, product, error = (
        tensor[rows_R] for tensor in (value_RI, weight_RI, mask_RI, product_RI, error_R)
    )
    for _ in range(exchanges):
        if not len(rows_R):
            return
        kept = mask.float()
        step = torch.addcmul(weight, value, kept - 1)  # `where` takes five times longer on a CPU
        alone = step * (2 * product + step * diagonal_I)
        change_R, restored_R, removed_R = find(step, alone + _infinite_where(kept), alone + _infinite_where(1 - kept))
        better_R = change_R < -smallest * error
        error = (error + change_R).clamp_min(0)
        pair_R2 = torch.stack([restored_R, removed_R], 1)
        if not better_R.all():
            weight_RI[rows_R], mask_RI[rows_R] = weight, mask
            done_R[rows_R[~better_R]] = True
            rows_R, value, weight, mask, product, error, step, pair_R2 = (
                tensor[better_R] for tensor in (rows_R, value, weight, mask, product, error, step, pair_R2)
            )
        steps_R2, (restored_R, removed_R) = step.gather(1, pair_R2), pair_R2.T
        product += steps_R2[:, :1] * gram_II[restored_R] + steps_R2[:, 1:] * gram_II[removed_R]
        every_R = torch.arange(len(rows_R), device=rows_R.device)
        mask[every_R, restored_R], mask[every_R, removed_R] = True, False
        weight[every_R, restored_R], weight[every_R, removed_R] = value[every_R, restored_R], 0.0
    weight_RI[rows_R], mask_RI[rows_R] = weight, mask


def _imported() -> ModuleType:
    from pipeline.pruning import swap_triton  # imports triton

    return swap_triton


def check_kernels(kernels: ModuleType, device: torch.device, group: int | None) -> None:
    """Compares the kernels with torch on a small matrix. Raises `RuntimeError` if they give no mask of the pattern, or another
    output error. The masks may differ where rounding decides between exchanges."""
    generator = torch.Generator().manual_seed(0)
    input_NI, dense_RI = torch.randn(96, 64, generator=generator), torch.randn(16, 64, generator=generator)
    input_NI += input_NI.roll(1, 1)
    pattern = Unstructured(0.5) if group is None else NofM(group // 2, group)
    gram_II, mask_RI = input_NI.T @ input_NI, pattern.select(dense_RI.abs())
    given = (dense_RI, dense_RI, mask_RI, gram_II)
    expected = swap(*given, group, REFRESH + 2, exchange_by_torch)
    found = swap(*(tensor.to(device) for tensor in given), group, REFRESH + 2, kernels.exchange).cpu()
    errors = [dense_RI * ~mask for mask in (mask_RI, expected, found)]
    before_R, expected_R, found_R = (_output_error(error, obs.product(error, gram_II)) for error in errors)
    kept, kept_before = (mask.unflatten(1, (-1, group or 64)).sum(2) for mask in (found, mask_RI))
    is_same = torch.equal(kept, kept_before) and abs(found_R.sum() / expected_R.sum() - 1) < 0.01
    if not is_same or (found_R > before_R).any():
        raise RuntimeError("a mask that they refined is wrong")


def _output_error(error_RI: Tensor, product_RI: Tensor) -> Tensor:
    """e G e^T of each row, (R,), given e and e G; in tiles of rows (see `obs.row_tile`)."""
    return torch.cat([tile.sum(1) for tile in (error_RI * product_RI).split(obs.ROW_TILE)])


def _infinite_where(chosen: Tensor) -> Tensor:
    """Infinity for 1, zero for 0."""
    return (1 - chosen).reciprocal_().sub_(1)


class _BestPair:
    """Finds the best exchange in each of some rows: change of the error, pruned weight and kept weight, (R,) each. Called with
    the step of each weight, and with the change of the error by that step alone: for the pruned weights (infinite at the
    kept ones), and for the kept weights (infinite at the pruned ones)."""

    def __init__(self, gram_II: Tensor) -> None:
        self.gram_II = gram_II

    def __call__(self, step_RI: Tensor, pruned_RI: Tensor, kept_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = min(CANDIDATES, step_RI.shape[1])
        pruned_RC, p_RC = pruned_RI.topk(count, 1, largest=False)
        kept_RC, k_RC = kept_RI.topk(count, 1, largest=False)
        both_RCC = self.gram_II[p_RC[:, :, None], k_RC[:, None, :]]
        both_RCC *= 2 * step_RI.gather(1, p_RC)[:, :, None]
        both_RCC *= step_RI.gather(1, k_RC)[:, None, :]
        both_RCC += pruned_RC[:, :, None] + kept_RC[:, None, :]
        change_R, place_R = both_RCC.flatten(1).min(1)
        p_R1, k_R1 = (place_R // count)[:, None], (place_R % count)[:, None]
        return change_R, p_RC.gather(1, p_R1).squeeze(1), k_RC.gather(1, k_R1).squeeze(1)


class _BestPairInGroups:
    """Like `_BestPair`, among all pairs within groups of M inputs. Of the M (M - 1) / 2 pairs, P, those of a kept and a pruned
    weight have a finite change."""

    def __init__(self, gram_II: Tensor, group: int) -> None:
        self.group = group
        self.pairs_P2 = list(itertools.combinations(range(group), 2))
        blocks_MMG = gram_II.unflatten(1, (-1, group)).unflatten(0, (-1, group)).diagonal(dim1=0, dim2=2)
        self.both_PG = torch.stack([2 * blocks_MMG[i, j] for i, j in self.pairs_P2])

    def __call__(self, step_RI: Tensor, pruned_RI: Tensor, kept_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # one contiguous matrix for each place in a group
        step_MRG, pruned_MRG, kept_MRG = (
            matrix.unflatten(1, (-1, self.group)).permute(2, 0, 1).contiguous()
            for matrix in (step_RI, pruned_RI, kept_RI)
        )
        change_PRG = step_RI.new_empty(len(self.pairs_P2), *step_MRG.shape[1:])
        for change_RG, (i, j), both_G in zip(change_PRG, self.pairs_P2, self.both_PG):
            torch.mul(step_MRG[i], step_MRG[j], out=change_RG).mul_(both_G)
            change_RG += torch.minimum(pruned_MRG[i] + kept_MRG[j], pruned_MRG[j] + kept_MRG[i])
        change_R, group_R = change_PRG.amin(0).min(1)
        every_R = torch.arange(len(group_R), device=group_R.device)
        pair_R = change_PRG[:, every_R, group_R].argmin(0)
        places_R2 = torch.tensor(self.pairs_P2, device=group_R.device)[pair_R] + self.group * group_R[:, None]
        first_R, second_R = places_R2.T
        is_kept_R = pruned_RI[every_R, first_R].isinf()
        return change_R, torch.where(is_kept_R, second_R, first_R), torch.where(is_kept_R, first_R, second_R)


INSTEAD = "each takes many launches, which is slow"
IN_GROUPS = TritonKernels(_imported, functools.partial(check_kernels, group=4), "exchanges in groups", INSTEAD)
IN_ROWS = TritonKernels(_imported, functools.partial(check_kernels, group=None), "exchanges in rows", INSTEAD)
