"""Ratios by layer: they follow what was measured, and their mean over all weights is the recipe's."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import api
from pipeline.pruning import scores
from pipeline.runtime.errors import UserError
from tests import families
from tests.pruning.test_prune import pruned, sparsity_by_layer


def test_a_power_law_gives_its_exponent():
    """Eigenvalues with P(x > t) = t^-(alpha - 1)."""
    for alpha in (2.0, 3.5):
        ranks = torch.arange(1, 801, dtype=torch.float64)
        eigenvalues = (ranks / 800) ** (-1 / (alpha - 1))
        assert scores.tail_exponent(torch.diag(eigenvalues.sqrt())) == pytest.approx(alpha, rel=0.02)


@pytest.mark.parametrize("allocation", ["alphapruning", "layer_error"])
def test_an_allocation_follows_its_measurements(tiny_llama, tmp_path, allocation):
    more = (f"prune.allocation={allocation}", "prune.sparsity=0.6", "prune.allocation_spread=0.1")
    masks, _ = pruned(tiny_llama, tmp_path / "p", *more)
    measured = json.loads((tmp_path / "p/allocation.json").read_text())["measured"]
    by_layer = sparsity_by_layer(masks)
    assert sum(by_layer) / 3 == pytest.approx(0.6, abs=0.02)
    assert max(by_layer) - min(by_layer) == pytest.approx(0.2, abs=0.03)
    most = max if allocation == "alphapruning" else min
    assert by_layer.index(max(by_layer)) == int(most(measured, key=measured.get))


@pytest.mark.parametrize("allocation", ["owl", "layer_error"])
def test_the_ratio_is_that_of_all_weights_though_layers_differ_in_size(allocation):
    """A dense layer and layers of experts, which have more weights. The mean over layers gave another ratio."""
    settings = {"method": "magnitude", "samples": 8, "seq_len": 32, "sparsity": 0.6, "allocation": allocation}
    masks = api.prune(families.tiny("deepseek_v3"), calibration=families.text(8, 32), **settings)
    kept, weights = sum(int(masks[name].sum()) for name in masks), sum(masks[name].numel() for name in masks)
    assert 1 - kept / weights == pytest.approx(0.6, abs=0.003)


@pytest.mark.parametrize(
    "allocation, key", [("alphapruning", "allocation"), ("layer_error", "allocation"), ("owl", "owl")]
)
def test_ratios_that_no_layer_can_have_are_refused(tiny_llama, tmp_path, allocation, key):
    """Cut off, they would have another mean than the recipe asks for."""
    more = [f"prune.allocation={allocation}", "prune.sparsity=0.9", "prune.owl_outliers=2"]
    with pytest.raises(UserError, match=f"set prune.{key}_spread=") as refused:
        pruned(tiny_llama, tmp_path / "p", *more, f"prune.{key}_spread=0.9")
    (tmp_path / "p/allocation.json").unlink()
    fits = re.search(rf"prune.{key}_spread=[0-9.]+", str(refused.value))[0]
    masks, _ = pruned(tiny_llama, tmp_path / "p", *more, fits)
    assert masks.sparsity() == pytest.approx(0.9, abs=0.03)  # rows of 32 inputs round down


def test_a_ratio_that_no_layer_can_have_is_named_itself(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="set prune.sparsity=0.99 or less, or prune.allocation=uniform"):
        pruned(tiny_llama, tmp_path / "p", "prune.allocation=alphapruning", "prune.sparsity=0.995")


@pytest.mark.parametrize("allocation", ["alphapruning", "layer_error", "owl"])
def test_damaged_weights_are_named_by_an_allocation_too(tiny_llama, tmp_path, allocation):
    shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight holds weights that are not finite"):
        pruned(tmp_path / "model", tmp_path / "p", f"prune.allocation={allocation}", "prune.sparsity=0.5")
