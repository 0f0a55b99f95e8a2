"""What a user's method, refinement, update or allocation may return, and that it must not change what it was given."""

import re

import pytest
import torch

from pipeline import api
from pipeline.pruning.combination import Combination, prune_method
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Prune
from pipeline.sparsity.patterns import Unstructured
from tests import families
from tests.pruning.test_combination import problem


@pytest.mark.parametrize(
    "key, base, body, says",
    [
        (
            "refine",
            "refinements:Refinement",
            "def refine(self, *it): return it[2].float()",
            "return torch.bool of (12, 32)",
        ),
        ("refine", "refinements:Refinement", "def refine(self, *it): return it[2] * False", "as many as in the mask"),
        ("refine", "refinements:Refinement", "needs = ('grams',)", "did you mean 'gram'?"),
        (
            "update",
            "updates:WeightUpdate",
            "def update(self, *it): return it[0][1:]",
            "return torch.float32 of (12, 32)",
        ),
        ("update", "updates:WeightUpdate", "def update(self, *it): pass", "update returned NoneType"),
        (
            "update",
            "updates:WeightUpdate",
            "def update(self, *it): return it[0] / 0",
            "returned weights of a that are not",
        ),
        ("method", "method:PruneMethod", "def prune(self, *it): pass", "set prune.group=auto"),
        ("method", "method:PruneMethod", "def score(self, *it): return it[0][:, :1]", "return a tensor of (12, 32)"),
    ],
)
def test_what_a_users_step_returns_is_checked(tmp_path, key, base, body, says):
    path = own_step(tmp_path, base, body)
    dense_RI, x_NI = problem()
    with pytest.raises(UserError, match=re.escape(says)):
        chosen = prune_method(Prune(group="layer", **{key: str(path)}), {"a": Unstructured(0.5)})
        weights, total = {"a": dense_RI.clone()}, chosen.observe(x_NI).double()
        chosen.compare_layer([(weights, total)])
        chosen.prune(weights, total)


def own_step(folder, base, body):
    module, _, name = base.partition(":")
    path = folder / f"my_{name}.py"
    path.write_text(f"from pipeline.pruning.{module} import {name}\nclass Mine({name}):\n    {body}\n")
    return path


def pruned(model, **settings):
    return api.prune(model, calibration=families.text(2, 16), samples=2, seq_len=16, sparsity=0.5, **settings)


@pytest.mark.parametrize(
    "body, says",
    [
        ("pass", "return a dict of masks by name"),
        ("return {name: it.abs().float() for name, it in it[0].items()}", "return torch.bool of (12, 32)"),
        ("return {name: it.T > 0 for name, it in it[0].items()}", "return torch.bool of (12, 32)"),
        ("return {name: it.div_(0) > 0 for name, it in it[0].items()}", "made weights of a that are not finite"),
    ],
)
@pytest.mark.parametrize("refine", ["none", "swaps"])
def test_what_a_users_prune_returns_is_checked(tmp_path, refine, body, says):
    path = own_step(tmp_path, "method:PruneMethod", f"def prune(self, *it): {body}")
    chosen = prune_method(Prune(method=str(path), refine=refine), {"a": Unstructured(0.5)})
    dense_RI, x_NI = problem()
    with pytest.raises(UserError, match=re.escape(says)):
        chosen.checked_prune({"a": dense_RI.clone()}, chosen.observe(x_NI).double())


def test_a_users_prune_that_only_returns_masks_is_applied(tmp_path):
    path = own_step(
        tmp_path, "method:PruneMethod", "def prune(self, *it): return {name: it > 0 for name, it in it[0].items()}"
    )
    model = families.tiny("llama")
    api.verify(model, pruned(model, method=path))


@pytest.mark.parametrize(
    "key, base, body, says",
    [
        ("method", "method:PruneMethod", "def score(self, *it): return it[0].abs_()", "score changes weight_OI"),
        ("method", "method:PruneMethod", "def score(self, *it): return it[0].abs() * it[1].sqrt_()", "changes total"),
        ("method", "method:PruneMethod", "def observe(self, it): return it.abs_().sum(0)", "changes input_NI"),
        ("refine", "refinements:Refinement", "def refine(self, *it): return it[2].logical_not_()", "changes mask_RI"),
        ("refine", "refinements:Refinement", "def refine(self, *it): return it[0].zero_() > 0", "changes dense_RI"),
        ("refine", "refinements:Refinement", "def refine(self, *it): return it[1].zero_() > 0", "changes weight_RI"),
        (
            "allocation",
            "allocation:Allocation",
            "def measure(self, *it): next(iter(it[0].values())).zero_()",
            "measure cha",
        ),
    ],
)
def test_a_users_step_must_not_change_what_others_read(tmp_path, key, base, body, says):
    """Restored weights stayed zero, and other matrices were scored by wrong sums, without a word."""
    path = own_step(tmp_path, base, body)
    with pytest.raises(UserError, match=f"{says}.* in place.*clone"):
        pruned(families.tiny("llama"), **{key: path})


def test_what_an_update_gives_outside_the_mask_is_ignored(tmp_path):
    path = own_step(tmp_path, "updates:WeightUpdate", "def update(self, *it): return it[0] * it[1] / it[1]")
    dense_RI, x_NI = problem()
    chosen = prune_method(Prune(update=str(path)), {"a": Unstructured(0.5)})
    weights = {"a": dense_RI.half()}
    mask_RI = chosen.prune(weights, chosen.observe(x_NI).double())["a"]
    assert torch.equal(weights["a"], dense_RI.half() * mask_RI)


@pytest.mark.parametrize(
    "body, says",
    [
        ("def ratios(self, *it): pass", "ratios returned None: return 4 numbers"),
        ("def measure(self, *it): pass", "measure returned None: return a number"),
        ("def measure(self, *it): return [1, 2]", "measure returned [1, 2]: return a number"),
    ],
)
def test_what_a_users_allocation_returns_is_checked(tmp_path, body, says):
    path = own_step(tmp_path, "allocation:Allocation", body)
    with pytest.raises(UserError, match=re.escape(says)):
        pruned(families.tiny("llama"), allocation=path)


def test_methods_of_a_users_class_are_not_taken_for_settings(tmp_path):
    body = "def update(self): pass\n    def score(self, weight_OI, total): return weight_OI.abs()"
    path = own_step(tmp_path, "method:PruneMethod", body)
    assert not isinstance(prune_method(Prune(method=str(path)), {}), Combination)
