"""Refinements and updates on small problems, compared with dense solvers and brute force."""

import itertools

import pytest
import torch

from pipeline.pruning import gram
from pipeline.pruning.combination import Combination, prune_method
from pipeline.pruning.refinements import Dsnot, Swaps
from pipeline.pruning.statistics import GRAM, MOMENTS, OBSERVE, SQUARE_SUM, Sums
from pipeline.pruning.swap import swap
from pipeline.pruning.updates import Admm, LeastSquares, ObsUpdate
from pipeline.registry import PRUNE_METHODS, REFINEMENTS, UPDATES
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Prune
from pipeline.sparsity.patterns import NofM, Pattern, Unstructured, parse
from tests.pruning.test_prune import pruned

PATTERNS = ("2of4", "4of8", "0.5", "0.7")


def problem(rows=12, inputs=32, tokens=200, seed=0):
    """Weights and correlated inputs."""
    torch.manual_seed(seed)
    inputs_NI = torch.randn(tokens, inputs) @ torch.randn(inputs, inputs) + torch.randn(inputs)
    return torch.randn(rows, inputs), inputs_NI


def errors(dense_RI, weight_RI, gram_II, damp=0.0):
    gram_II = gram_II.double() + damp * gram_II.diagonal().mean() * torch.eye(len(gram_II))
    lost_RI = (dense_RI - weight_RI).double()
    return ((lost_RI @ gram_II) * lost_RI).sum(1)


@pytest.mark.parametrize("needs", [{SQUARE_SUM}, {MOMENTS}, {GRAM}, {GRAM, MOMENTS}, {GRAM, MOMENTS, SQUARE_SUM}])
def test_sums_are_unpacked_as_they_were_packed(needs):
    _, x_NI = problem()
    sums = Sums(needs)
    total = sum(sums.observe(part).double() for part in x_NI.split(50))
    statistics = sums.read(total, x_NI.shape[1])
    torch.testing.assert_close(statistics.square_sum_I.double(), x_NI.double().square().sum(0), rtol=1e-5, atol=0)
    if MOMENTS in needs:
        torch.testing.assert_close(statistics.moments_3I[1], x_NI.double().sum(0), rtol=1e-5, atol=1e-3)
    if GRAM in needs:
        torch.testing.assert_close(statistics.gram_II, x_NI.T @ x_NI, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize("updated", [False, True])
def test_swaps_never_add_error_and_keep_the_pattern(sparsity, updated):
    dense_RI, x_NI = problem()
    gram_II, pattern = x_NI.T @ x_NI, parse(sparsity)
    mask_RI = pattern.select(dense_RI.abs() * gram_II.diagonal().sqrt())
    weight_RI = dense_RI * mask_RI
    if updated:
        weight_RI = LeastSquares(Prune()).update(dense_RI, weight_RI, mask_RI, gram_II.clone(), "w") * mask_RI
    before, group = errors(dense_RI, weight_RI, gram_II), getattr(pattern, "m", None)
    for budget in (1, 3, 50):
        new_RI = swap(dense_RI, weight_RI, mask_RI, gram_II, group, budget)
        assert pattern.violation(new_RI) is None
        assert torch.equal(new_RI.sum(1), mask_RI.sum(1))
        kept_RI = torch.where(mask_RI, weight_RI, dense_RI) * new_RI
        after = errors(dense_RI, kept_RI, gram_II)
        assert (after <= before * (1 + 1e-6)).all()
        before = after
    assert after.sum() < 0.95 * errors(dense_RI, weight_RI, gram_II).sum()


@pytest.mark.parametrize("sparsity", [*PATTERNS, "1of16"])
def test_rows_are_exchanged_in_tiles(sparsity, monkeypatch):
    """The rows of a tile may all be done before those of another."""
    dense_RI, x_NI = problem()
    dense_RI[2:6] = 0
    mask_RI = parse(sparsity).select(dense_RI.abs())
    given = (dense_RI, dense_RI * mask_RI, mask_RI, x_NI.T @ x_NI, getattr(parse(sparsity), "m", None), 50)
    expected = swap(*given)
    monkeypatch.setattr("pipeline.pruning.swap.TILE", 2 * dense_RI.shape[1])
    assert torch.equal(swap(*given), expected) and not torch.equal(expected, mask_RI)
    assert swap(*(tensor[:0] for tensor in given[:3]), *given[3:]).shape == (0, dense_RI.shape[1])


@pytest.mark.parametrize("sparsity", ["2of4", "0.5"])
def test_a_weight_that_is_removed_and_restored_has_the_value_that_its_exchange_was_chosen_for(sparsity):
    """Far from its dense value: the exchange restored the dense one, and the error of such rows grew."""
    dense_RI, x_NI = problem(rows=64, inputs=64)
    gram_II, pattern = x_NI.T @ x_NI, parse(sparsity)
    mask_RI = pattern.select(dense_RI.abs())
    weight_RI = (dense_RI + torch.randn(64, 64)) * mask_RI
    new_RI = swap(dense_RI, weight_RI, mask_RI, gram_II, getattr(pattern, "m", None), 100)
    kept_RI = torch.where(mask_RI, weight_RI, dense_RI) * new_RI
    assert (errors(dense_RI, kept_RI, gram_II) <= errors(dense_RI, weight_RI, gram_II) * (1 + 1e-6)).all()


@pytest.mark.parametrize("pattern", [NofM(2, 4), Unstructured(0.5)])
def test_one_swap_is_the_best_of_all(pattern):
    """Compared with every exchange that keeps the pattern."""
    dense_RI, x_NI = problem(rows=5, inputs=12)
    gram_II = x_NI.T @ x_NI
    mask_RI = pattern.select(dense_RI.abs())
    new_RI = swap(dense_RI, dense_RI * mask_RI, mask_RI, gram_II, getattr(pattern, "m", None), 1)
    for row in range(5):
        best = errors(dense_RI[row : row + 1], dense_RI[row : row + 1] * mask_RI[row], gram_II)
        for p, k in itertools.product(range(12), repeat=2):
            other_I = mask_RI[row].clone()
            other_I[p], other_I[k] = True, False
            if other_I.sum() == mask_RI[row].sum() and pattern.violation(other_I[None]) is None:
                best = torch.minimum(best, errors(dense_RI[row : row + 1], dense_RI[row : row + 1] * other_I, gram_II))
        swapped = errors(dense_RI[row : row + 1], dense_RI[row : row + 1] * new_RI[row], gram_II)
        torch.testing.assert_close(swapped, best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_least_squares_is_the_solution_of_a_dense_solver(sparsity):
    dense_RI, x_NI = problem()
    gram_II, settings = x_NI.T @ x_NI, Prune(update_steps=300)
    mask_RI = parse(sparsity).select(dense_RI.abs())
    solution_RI = LeastSquares(settings).update(dense_RI, dense_RI * mask_RI, mask_RI, gram_II.clone(), "w")
    damped_II = gram_II.double() + settings.damp * gram_II.diagonal().mean() * torch.eye(32)
    for row, mask_I in enumerate(mask_RI):
        kept = mask_I.nonzero().squeeze(1)
        target = damped_II[kept] @ dense_RI[row].double()
        expected = torch.linalg.solve(damped_II[kept][:, kept], target)
        assert (solution_RI[row, kept] - expected).norm() < 1e-5 * expected.norm()
        assert (solution_RI[row, ~mask_I] == 0).all()


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_updates_reduce_the_error_and_least_squares_most(sparsity):
    dense_RI, x_NI = problem(rows=40, inputs=64)
    gram_II, settings = x_NI.T @ x_NI, Prune(update_steps=300)
    mask_RI = parse(sparsity).select(dense_RI.abs())
    plain = errors(dense_RI, dense_RI * mask_RI, gram_II, settings.damp)
    updated = {}
    for kind in (ObsUpdate, Admm, LeastSquares):
        weight_RI = kind(settings).update(dense_RI.clone(), dense_RI * mask_RI, mask_RI, gram_II.clone(), "w") * mask_RI
        updated[kind] = errors(dense_RI, weight_RI, gram_II, settings.damp)
        assert updated[kind].sum() < plain.sum()
    assert (updated[LeastSquares] <= updated[ObsUpdate] * (1 + 1e-4)).all()
    assert (updated[LeastSquares] <= updated[Admm] * (1 + 1e-4)).all()
    # no step increases the error
    few = LeastSquares(Prune(update_steps=5)).update(dense_RI, dense_RI * mask_RI, mask_RI, gram_II.clone(), "w")
    assert (errors(dense_RI, few, gram_II, settings.damp) <= plain).all()


def test_an_input_far_larger_than_the_rest_as_models_have():
    """Rounding must not make refinements and updates add error; each is measured with its own damping."""
    dense_RI, x_NI = problem(rows=40, inputs=64)
    x_NI[:, 5] *= 3000
    gram_II, settings = x_NI.T @ x_NI, Prune()
    mask_RI = parse("0.6").select(dense_RI.abs() * gram_II.diagonal().sqrt())
    masked_RI = dense_RI * mask_RI
    new_RI = swap(dense_RI, masked_RI, mask_RI, gram_II, None, 100)
    before = errors(dense_RI, masked_RI, gram_II)
    assert (errors(dense_RI, dense_RI * new_RI, gram_II) <= before * (1 + 1e-6)).all()
    for kind in (ObsUpdate, Admm, LeastSquares):
        damp_II = settings.damp * gram_II.diagonal().diag()
        if kind is not Admm:
            damp_II = settings.damp * gram_II.diagonal().mean() * torch.eye(64)
        weight_RI = kind(settings).update(dense_RI.clone(), masked_RI, mask_RI, gram_II.clone(), "w") * mask_RI
        after = errors(dense_RI, weight_RI, gram_II + damp_II)
        assert after.sum() < errors(dense_RI, masked_RI, gram_II + damp_II).sum(), kind


@pytest.mark.parametrize("update", [name for name in UPDATES.entries if name != "none"])
def test_an_input_that_is_always_zero(update):
    dense_RI, x_NI = problem()
    x_NI[:, 3] = 0
    mask_RI = parse("0.5").select(dense_RI.abs())
    gram_II = x_NI.T @ x_NI
    weight_RI = UPDATES.entry(update).load()(Prune()).update(dense_RI, dense_RI * mask_RI, mask_RI, gram_II, "w")
    assert weight_RI.isfinite().all()


@pytest.mark.parametrize("refine", REFINEMENTS.entries)
@pytest.mark.parametrize("update", UPDATES.entries)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_every_combination_keeps_the_pattern(method, refine, update):
    for sparsity in ("2of4", "0.7"):
        dense_RI, x_NI = problem()
        pattern = parse(sparsity)
        combination = prune_method(Prune(method=method, refine=refine, update=update), {"a": pattern, "b": pattern})
        total = sum(combination.observe(part).double() for part in x_NI.split(100))
        dense = {"a": dense_RI, "b": dense_RI.flip(0).bfloat16()}
        weights = {name: weight_OI.clone() for name, weight_OI in dense.items()}
        masks = combination.prune(weights, total)
        for name, mask_OI in masks.items():
            assert pattern.violation(mask_OI) is None
            assert (weights[name][~mask_OI] == 0).all() and not weights[name][~mask_OI].signbit().any()
            if update == "none" and method != "sparsegpt":
                assert torch.equal(weights[name][mask_OI], dense[name][mask_OI])


@pytest.mark.parametrize(
    "key", [{"method": "sparsegpt"}, *({"update": update} for update in UPDATES.entries if update != "none")]
)
def test_an_update_that_overflows_float16_is_refused(key):
    """The update itself is computed in float32, where it is finite."""
    x_NI = torch.randn(100, 1).expand(100, 32) + 0.01 * torch.randn(100, 32)
    chosen = prune_method(Prune(damp=1e-3, **key), {"a": Unstructured(0.5)})
    weights = {"a": torch.linspace(40_000, 60_000, 12 * 32).view(12, 32).half()}
    with pytest.raises(UserError, match="overflow: set prune.damp=0.01 or dtype=bfloat16"):
        chosen.prune(weights, chosen.observe(x_NI).double())


def test_names_for_combinations_give_the_same_results():
    dense_RI, x_NI = problem()
    for name, steps in {
        "dsnot": {"method": "wanda", "refine": "dsnot"},
        "wanda_seq": {"method": "wanda", "update": "obs"},
        "magnitude_seq": {"method": "magnitude", "update": "obs"},
    }.items():
        results = []
        for settings in (Prune(method=name), Prune(**steps)):
            method = prune_method(settings, {"a": NofM(2, 4)})
            weights = {"a": dense_RI.clone()}
            masks = method.prune(weights, method.observe(x_NI).double())
            results.append((masks["a"], weights["a"]))
        assert all(torch.equal(a, b) for a, b in zip(*results))
    message = PRUNE_METHODS.entry("dsnot").problem(Prune(method="dsnot", refine="swaps"))
    assert "prune.refine=none" in message


def test_a_method_with_a_custom_statistic_can_be_combined(tmp_path):
    (tmp_path / "largest.py").write_text(
        "from pipeline.pruning.method import PruneMethod\n"
        "class Largest(PruneMethod):\n"
        "    '''By the sum of absolute inputs'''\n"
        "    def observe(self, input_NI):\n"
        "        return input_NI.abs().sum(0, keepdim=True)\n"
        "    def score(self, weight_OI, total):\n"
        "        assert total.shape == (1, weight_OI.shape[1])\n"
        "        return weight_OI.abs() * total\n"
    )
    dense_RI, x_NI = problem()
    settings = Prune(method=str(tmp_path / "largest.py"), refine="swaps", update="least_squares")
    method = prune_method(settings, {"a": NofM(2, 4)})
    mask_OI = method.prune({"a": dense_RI.clone()}, method.observe(x_NI).double())["a"]
    assert NofM(2, 4).violation(mask_OI) is None


def test_statistics_are_observed_once():
    swaps_and_update = prune_method(Prune(method="sparsegpt", refine="swaps", update="obs"), {})
    assert isinstance(swaps_and_update, Combination)
    _, x_NI = problem()
    assert swaps_and_update.observe(x_NI).numel() == gram.packed_length(32)
    assert torch.equal(OBSERVE[GRAM](x_NI), swaps_and_update.observe(x_NI))


@pytest.mark.parametrize("refine", ["swaps", "dsnot"])
def test_a_refinement_refuses_a_pattern_that_it_does_not_know_before_any_text_is_read(refine):
    class Custom(Pattern):
        ratio = 0.5

    with pytest.raises(UserError, match="set prune.refine=none"):
        prune_method(Prune(refine=refine), {"a": Custom()})


@pytest.mark.parametrize("kind", [Swaps, Dsnot])
def test_rows_that_are_all_pruned_or_all_kept_stay_so(kind):
    """As scores that are compared over a matrix or a layer leave them."""
    dense_RI, x_NI = problem()
    statistics = Sums({GRAM, MOMENTS}).read(Sums({GRAM, MOMENTS}).observe(x_NI).double(), 32)
    for pattern, part in ((Unstructured(0.5), dense_RI > 0), (NofM(2, 4), NofM(2, 4).select(dense_RI))):
        mask_RI = part.clone()
        mask_RI[:8] = False
        if isinstance(pattern, Unstructured):
            mask_RI[4:8] = True
        new_RI = kind(Prune()).refine(dense_RI, dense_RI * mask_RI, mask_RI, statistics, pattern)
        assert torch.equal(new_RI.sum(1), mask_RI.sum(1))


def test_a_mask_that_breaks_its_pattern_is_told_with_what_was_chosen(tiny_llama, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from pipeline.pruning.method import PruneMethod\n"
        "class Mine(PruneMethod):\n"
        "    def prune(self, weights, total): return {name: it == it for name, it in weights.items()}\n"
    )
    with pytest.raises(UserError, match="^mine [+] OBS on model.layers.0.*: set another prune.method"):
        pruned(tiny_llama, tmp_path / "p", f"prune.method={path}", "prune.update=obs")
