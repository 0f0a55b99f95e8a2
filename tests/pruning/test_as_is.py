"""`prune.sparsity=as_is`: the masks of a model that another program pruned are where its weights are zero."""

import pytest
import torch

from pipeline.models import model_files
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from tests.pruning.test_prune import pruned, settings

AS_IS = ("prune.method=magnitude", "prune.sparsity=as_is")


@pytest.fixture(scope="module")
def theirs(tiny_llama, tmp_path_factory):
    """A model with other weights than the dense one, other ratios in each row, and dense values in a projection."""
    folder = tmp_path_factory.mktemp("theirs")
    more = ("prune.method=sparsegpt", "prune.sparsity=0.6", 'prune.overrides={"*q_proj*": dense, "*up_proj*": 2of4}')
    pruned(tiny_llama, folder / "run", *more)
    return folder / "run" / "model"


DENSE = 'prune.overrides={"*q_proj*": dense}'


def test_masks_are_the_zeros_and_no_weight_changes(theirs, tmp_path):
    before = dict(model_files.tensors(theirs))
    masks, after = pruned(theirs, tmp_path / "p", *AS_IS, DENSE)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert masks and all(torch.equal(mask, before[name] != 0) for name, mask in masks.items())
    assert not any("q_proj" in name for name in masks)
    masks.check_patterns()


def test_a_matrix_without_zeros_is_named(theirs, tmp_path):
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj.weight: none of its weights is zero"):
        pruned(theirs, tmp_path / "p", *AS_IS)


@pytest.mark.parametrize(
    "more",
    [
        ("prune.sparsity=as_is",),
        (*AS_IS, "prune.update=admm"),
        (*AS_IS, "prune.refine=swaps"),
        ("prune.sparsity=0.5", 'prune.overrides={"*up_proj*": as_is}'),
    ],
)
def test_other_methods_are_refused(theirs, more):
    with pytest.raises(UserError, match="prune.sparsity=as_is leaves the model as it is"):
        settings(theirs, *more)


def test_a_near_name_is_refused():
    with pytest.raises(UserError, match="2of4, or as_is"):
        reader.load(["model=x", "stages=[prune]", "prune.sparsity=as-is"])
