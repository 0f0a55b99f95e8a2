"""The order of channels in which N of M keeps most importance: the maths."""

from itertools import permutations

import pytest
import torch

from pipeline.pruning.channel_order import channel_order, kept_importance
from pipeline.sparsity.patterns import NofM


def score(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, channels, generator=generator) ** 3 * torch.rand(channels, generator=generator) ** 2


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(4, 8), NofM(1, 4), NofM(3, 4)], ids=str)
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_kept_importance_never_falls_and_channels_stay_in_their_head(pattern, rounds):
    for seed in range(5):
        given = score(24, 64, seed)
        order = channel_order(given, pattern, 32, rounds)
        assert order.sort().values.tolist() == list(range(64))
        assert (order // 32).tolist() == [0] * 32 + [1] * 32
        assert kept_importance(given[:, order], pattern) >= kept_importance(given, pattern)
        assert torch.equal(order, channel_order(given, pattern, 32, rounds))


def test_an_exchange_keeps_more_than_dealing_does():
    kept = [
        kept_importance((it := score(24, 64))[:, channel_order(it, NofM(2, 4), 64, n)], NofM(2, 4)) for n in (0, 1, 4)
    ]
    assert kept[0] < kept[1] <= kept[2]


def test_the_best_order_is_found_where_all_can_be_tried():
    given, pattern = score(3, 8, seed=1), NofM(1, 2)
    best = max(kept_importance(given[:, list(order)], pattern) for order in permutations(range(8)) if order[0] == 0)
    assert kept_importance(given[:, channel_order(given, pattern, 8, 10)], pattern) > 0.98 * best


def test_an_order_that_cannot_be_better_is_left():
    assert channel_order(torch.ones(4, 16), NofM(2, 4), 16, 2).tolist() == list(range(16))
    assert channel_order(torch.zeros(4, 16), NofM(2, 4), 16, 2).tolist() == list(range(16))
