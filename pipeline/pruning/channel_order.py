"""The order of input channels in which N of M keeps most importance (Zhang et al. 2024, "Plug-and-Play: An Efficient
Post-training Pruning Method for Large Language Models", section 3.2). Pure math.

Shapes: R = rows, V = channels, G = groups of M channels.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.sparsity.patterns import NofM


def kept_importance(score_RV: Tensor, pattern: NofM) -> float:
    """The share of the importance that the pattern keeps."""
    kept = score_RV.masked_fill(~pattern.select(score_RV), 0).sum(dtype=torch.float64)
    return float(kept / score_RV.sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny))


def channel_order(score_RV: Tensor, pattern: NofM, head: int, rounds: int) -> Tensor:
    """(V,) on the CPU: the channel for each place. Channels stay within their run of `head`, where the order is the given one
    unless another keeps more importance."""
    return torch.cat([part + head * i for i, part in enumerate(_ordered(score_RV, pattern, head, rounds))])


def _ordered(score_RV: Tensor, pattern: NofM, head: int, rounds: int) -> list[Tensor]:
    orders = []
    for score in score_RV.split(head, dim=1):
        identity = torch.arange(head)
        order_GM = _initial_groups(score, pattern.m)
        best, kept = identity, kept_importance(score, pattern)
        for done in range(rounds + 1):
            order = order_GM.flatten()
            now = kept_importance(score[:, order.to(score.device)], pattern)
            if now > kept:
                best, kept = order.clone(), now
            elif done > 1:  # the first orders may be worse than the given one
                break
            if done < rounds:
                _exchange_(score, order_GM, pattern)
        orders.append(best)
    return orders


def _initial_groups(score_RV: Tensor, m: int) -> Tensor:
    """Channels sorted by importance and distributed over the groups in turn, back and forth, (G, M)."""
    ranked = score_RV.sum(0, dtype=torch.float64).argsort(descending=True, stable=True).cpu().view(m, -1)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.T.contiguous()


def _exchange_(score_RV: Tensor, order_GM: Tensor, pattern: NofM) -> None:
    """For each place in the groups, assigns the channels at that place to the groups such that most importance is kept.

    Of a group's other channels, a row keeps the N - 1 best, and the N-th best t or the new channel's x, whichever is higher:
    max(x, t) = (x + t + |x - t|) / 2, whose first terms sum to the same for each assignment."""
    for place in range(pattern.m):
        on_device = order_GM.to(score_RV.device)
        others = [other for other in range(pattern.m) if other != place]
        rest_RGM = score_RV[:, on_device[:, others]]
        nth_RG = rest_RGM.topk(pattern.n, dim=2).values[..., -1]
        new_RG = score_RV[:, on_device[:, place]]
        gain_GG = torch.cdist(new_RG.T.contiguous(), nth_RG.T.contiguous(), p=1)
        channels, groups = map(torch.from_numpy, linear_sum_assignment(gain_GG.cpu().numpy(), maximize=True))
        order_GM[groups, place] = order_GM[channels, place]
