"""SparseGPT's results for a row do not depend on the other rows, although the rounding of a product depends on its shape."""

import pytest
import torch

from pipeline.pruning import gram, obs
from pipeline.runtime import processes
from pipeline.sparsity.patterns import parse


@pytest.mark.parametrize("count, tile, ranks", [(10, 1, 3), (10, 4, 3), (1100, 512, 2), (100, 512, 2), (1536, 512, 8)])
def test_the_shares_are_whole_tiles_and_cover_each_row_once(monkeypatch, count, tile, ranks):
    monkeypatch.setattr(processes, "world_size", lambda: ranks)
    rows = []
    for rank in range(ranks):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        share = processes.share_of(count, tile)
        assert share.start % tile == 0 or share.start == count
        rows += range(count)[share]
    assert rows == list(range(count))


def make_rounding_depend_on_shape(monkeypatch) -> None:
    """An exaggerated form of a GPU's behaviour."""
    real = torch.Tensor.addmm_

    def addmm_(self, left, right, *, alpha):
        return real(self, left, right, alpha=alpha).add_(1e-4 * right.shape[1])

    monkeypatch.setattr(torch.Tensor, "addmm_", addmm_)


def test_tiles_make_rows_independent_of_the_share(monkeypatch):
    torch.manual_seed(0)
    inputs = torch.randn(400, 256)
    factor_II, _ = obs.factor(gram.unpacked(gram.packed(inputs), 256), 0.01, "w", print)
    weight_RI, pattern = torch.randn(12, 256), parse("2of4")

    def pruned(rows: slice, tile: int | None) -> torch.Tensor:
        part_RI = weight_RI[rows].clone()
        mask_RI = obs.prune_rows(part_RI, factor_II, None, obs.Score(torch.ones(256)), pattern, tile)
        assert part_RI[~mask_RI].count_nonzero() == 0
        return part_RI

    parts = [slice(0, 8), slice(8, 12), slice(12, 12)]  # a rank may have no rows
    assert torch.allclose(pruned(slice(0, 12), 4), pruned(slice(0, 12), None), atol=1e-4)
    make_rounding_depend_on_shape(monkeypatch)
    assert not torch.equal(torch.cat([pruned(part, None) for part in parts]), pruned(slice(0, 12), None))
    assert torch.equal(torch.cat([pruned(part, 4) for part in parts]), pruned(slice(0, 12), 4))
