"""Patterns keep exactly as many weights as they say, prune the lowest scores, and break ties as the published code does."""

import pytest
import torch

from pipeline.pruning.combination import prune_method
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Prune
from pipeline.sparsity import patterns


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2)])
def test_the_n_largest_of_each_m_are_kept(n, m):
    score = torch.rand(12, 5 * m)
    mask = patterns.NofM(n, m).select(score)
    kept = mask.unflatten(1, (-1, m))
    assert (kept.sum(2) == n).all()
    groups = score.unflatten(1, (-1, m))
    least_kept = groups.masked_fill(~kept, torch.inf).amin(2)
    most_pruned = groups.masked_fill(kept, -torch.inf).amax(2)
    assert (least_kept >= most_pruned).all()


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7, 0.99])
def test_each_row_loses_exactly_the_ratio_of_its_lowest_scores(ratio):
    score = torch.rand(9, 37)
    mask = patterns.Unstructured(ratio).select(score)
    assert (~mask).sum(1).tolist() == [int(37 * ratio)] * 9
    assert (
        score[~mask].numel() == 0
        or (score.masked_fill(mask, -torch.inf).amax(1) <= score.masked_fill(~mask, torch.inf).amin(1)).all()
    )


def test_ties_of_n_of_m_are_broken_as_in_the_published_loop():
    """SparseGPT's and Wanda's loop: topk(largest=False) of each group of M columns over all rows, then scatter."""
    score = torch.randint(0, 3, (64, 32)).float()
    published = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, 32, 4):
        lowest = torch.topk(score[:, start : start + 4], 2, dim=1, largest=False)[1]
        published.scatter_(1, start + lowest, True)
    assert torch.equal(patterns.NofM(2, 4).select(score), ~published)


def test_ties_in_a_row_are_broken_by_column_order():
    mask = patterns.Unstructured(0.5).select(torch.ones(3, 8))
    assert mask.tolist() == [[False] * 4 + [True] * 4] * 3


@pytest.mark.parametrize("text", ["2of4", "2:4", " 2 of 4 "])
def test_notations_of_a_pattern(text):
    assert patterns.parse(text) == patterns.NofM(2, 4)
    assert patterns.parse(str(patterns.parse(text))) == patterns.NofM(2, 4)


@pytest.mark.parametrize("value", [124, 248, 64, "124", 1.0, 0, -0.5, "4of4", "0of4", "x", None, float("nan")])
def test_invalid_patterns_are_refused(value):
    with pytest.raises(UserError, match=r"prune\.sparsity"):
        patterns.parse(value)


def test_inputs_that_m_does_not_divide_are_refused():
    assert "not divisible by 8" in patterns.NofM(4, 8).misfit(172)
    assert patterns.NofM(2, 4).misfit(172) is None


def test_a_broken_group_is_found():
    mask = patterns.NofM(2, 4).select(torch.rand(4, 16))
    assert patterns.NofM(2, 4).violation(mask) is None
    mask[3, 8:12] = torch.tensor([True, True, True, False])
    assert "row 3, inputs 8 to 11" in patterns.NofM(2, 4).violation(mask)


@pytest.mark.parametrize("pattern", ["2of4", "4of8", "1of4", "3of4"])
def test_the_forms_for_gpus_select_the_same_groups(pattern, monkeypatch):
    """They neither wait for the GPU nor look for ties first; equal scores are pruned from the left."""
    pattern = patterns.parse(pattern)
    score = torch.rand(30, 8 * pattern.m)
    assert torch.equal(pattern._by_rank(score.unflatten(1, (-1, pattern.m))).flatten(1), pattern.select(score))
    tied = torch.randint(0, 3, score.shape).float()
    mask = pattern._by_rank(tied.unflatten(1, (-1, pattern.m)))
    order = tied.unflatten(1, (-1, pattern.m)).sort(dim=2, stable=True).indices
    expected = torch.ones_like(mask).scatter_(2, order[..., : pattern.m - pattern.n], False)
    assert torch.equal(mask, expected)
    monkeypatch.setattr(patterns, "RANKED", 1)  # row by row
    assert torch.equal(pattern._by_rank(tied.unflatten(1, (-1, pattern.m))), expected)


@pytest.mark.parametrize("values", [3, 1000])
@pytest.mark.parametrize("k", [1, 10, 18, 36, 37])
def test_the_forms_for_gpus_select_the_same_rows_and_threshold(k, values):
    score = torch.randint(0, values, (9, 37)).float()
    kth = score.kthvalue(k, keepdim=True).values
    assert torch.equal(~patterns._lowest(score, kth, k), patterns.all_but_lowest(score, k))
    for row in score:
        assert torch.equal(patterns._kth_lowest_of_one(row[None], k), patterns.kth_lowest(row[None], k))


@pytest.mark.parametrize("pattern", ["2of4", "3of4", "0.5"])
def test_is_broken_says_whether_there_is_a_violation(pattern):
    pattern = patterns.parse(pattern)
    good = pattern.select(torch.rand(4, 16))
    for mask in (good, ~good, torch.ones_like(good), torch.zeros_like(good)):
        assert bool(pattern.is_broken(mask)) == (pattern.violation(mask) is not None)
    assert not pattern.is_broken(good) and pattern.is_broken(torch.ones_like(good))


@pytest.mark.parametrize("method", ["wanda", "wanda_variant", "sparsegpt", "magnitude_iter"])
def test_every_method_refuses_a_pattern_that_returns_no_bool_mask(method):
    class Floats(patterns.Pattern):
        ratio = 0.5

        def select(self, score_OI, whole_matrix=False):
            return torch.ones_like(score_OI)

    chosen = prune_method(Prune(method=method), {"w": Floats()})
    total = chosen.observe(torch.randn(40, 16)).double()
    with pytest.raises(UserError, match=r"Floats.select returned torch.float32 of \(8, 16\) for w: return torch.bool"):
        chosen.prune({"w": torch.randn(8, 16)}, total)
