"""`prune.target=dense`: what updated weights reproduce, compared with a plain formula and plain forwards."""

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipeline import api as espalier
from pipeline import registry
from pipeline.data import sources, token_windows
from pipeline.models import processors
from pipeline.pruning.combination import prune_method
from pipeline.pruning.dense_target import packed_with_difference, solve
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.settings.schema import Prune
from pipeline.stages import prune
from tests import families
from tests.pruning.test_prune import pruned, settings

DENSE = "prune.target=dense"
LEAST_SQUARES = ("prune.update=least_squares", "calibration.batch_size=1")
MATRICES = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def seen(model: nn.Module, windows: Tensor, outputs: bool = False) -> dict[str, Tensor]:
    """The inputs of each matrix, or its outputs, (N, ...) in float64."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if re.search(rf"({MATRICES})$", name):

            def see(module, args, out, name=f"{name}.weight"):
                found.setdefault(name, []).append((out if outputs else args[0]).flatten(0, 1).double())

            hooks.append(module.register_forward_hook(see))
    with torch.no_grad():
        for window in windows:
            model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def calibration_windows(origin, *more) -> Tensor:
    chosen = settings(origin, *more)
    source = sources.source(chosen.calibration.dataset, chosen.mirror, chosen.calibration.split)
    tokenizer = processors.tokenizer(origin, chosen)
    return token_windows.calibration(source, tokenizer, 8, chosen.calibration.seq_len, seed=0)


def solution(weight_OI: Tensor, dense_NI: Tensor, input_NI: Tensor, damp: float) -> Tensor:
    """W (D^T X + lambda I) (X^T X + lambda I)^-1."""
    gram_II = input_NI.T @ input_NI
    damping_II = damp * gram_II.diagonal().mean() * torch.eye(len(gram_II), dtype=torch.float64)
    return weight_OI.double() @ (dense_NI.T @ input_NI + damping_II) @ (gram_II + damping_II).inverse()


def test_the_solution_minimises_the_damped_error_and_leaves_dead_inputs():
    torch.manual_seed(0)
    dense_NI, weight_OI = torch.randn(60, 12), torch.randn(5, 12)
    input_NI = dense_NI + 0.3 * torch.randn(60, 12)
    input_NI[:, 3] = 0
    gram_II = input_NI.T @ input_NI
    difference_II = packed_with_difference(torch.empty(0), dense_NI, input_NI).view(12, 12)
    solved_OI = solve(weight_OI, difference_II, gram_II, 0.01, "w")
    damping = 0.01 * gram_II.diagonal().mean()

    def loss(value_OI: Tensor) -> Tensor:
        lost = dense_NI.double() @ weight_OI.double().T - input_NI.double() @ value_OI.T
        return lost.square().sum() + damping * (value_OI - weight_OI).square().sum()

    value_OI = solved_OI.clone().requires_grad_()
    (gradient_OI,) = torch.autograd.grad(loss(value_OI), value_OI)
    assert gradient_OI.norm() < 1e-5 * loss(weight_OI.double())
    assert torch.equal(solved_OI[:, 3], weight_OI[:, 3].double())
    assert torch.equal(solve(weight_OI, torch.zeros(12, 12), gram_II, 0.01, "w"), weight_OI.double())
    live = [i for i in range(12) if i != 3]  # without damping, dead inputs do not make the sum singular
    assert torch.equal(solve(weight_OI, difference_II, gram_II, 0.0, "w")[:, 3], weight_OI[:, 3].double())
    gram_II[live[0]] = gram_II[live[1]]
    gram_II[:, live[0]] = gram_II[:, live[1]]
    with pytest.raises(UserError, match=r"w: the Gram matrix is singular at prune.damp=0: set prune.damp=0.01"):
        solve(weight_OI, difference_II, gram_II, 0.0, "w")


def test_the_weights_before_pruning_equal_a_plain_formula(tiny_llama, tmp_path):
    """The second layer's; `update` gets them as the dense ones. The inputs are those after the matrices before are pruned."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from pipeline.pruning.updates import WeightUpdate\n"
        "class Mine(WeightUpdate):\n"
        "    def update(self, dense_RI, weight_RI, mask_RI, gram_II, name):\n"
        f"        torch.save(dense_RI, f'{tmp_path}/{{name}}.pt')\n"
        "        return weight_RI\n"
    )
    more = (f"prune.update={tmp_path}/mine.py", "prune.damp=0.05", "calibration.batch_size=1", DENSE)
    _, weights = pruned(tiny_llama, tmp_path / "p", *more)
    windows = calibration_windows(tiny_llama, *more)
    dense, hybrid = (AutoModelForCausalLM.from_pretrained(tiny_llama) for _ in range(2))
    hybrid.load_state_dict({k: w for k, w in weights.items() if ".layers.0." in k}, strict=False)
    dense_inputs = seen(dense, windows)
    layer = "model.layers.1"
    for first, names in {
        "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj": ("self_attn.o_proj",),
        "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    }.items():
        key = f"{layer}.{first}.weight"
        inputs = seen(hybrid, windows)
        done = {f"{layer}.{name}.weight" for name in names}
        hybrid.load_state_dict({name: weights[name] for name in done}, strict=False)
        stacked_RI = torch.cat([dense.get_parameter(f"{layer}.{name}.weight").detach() for name in names])
        expected_RI = solution(stacked_RI, dense_inputs[key], inputs[key], 0.05)
        found_RI = torch.load(tmp_path / f"{key}.pt").double()
        assert (found_RI - expected_RI).norm() < 1e-4 * expected_RI.norm()
        assert (found_RI - stacked_RI).norm() > 1e-2 * stacked_RI.norm()


@pytest.mark.slow
@pytest.mark.parametrize("more", [LEAST_SQUARES, ("prune.method=sparsegpt",)])
def test_the_first_matrices_are_as_with_the_pruned_target(tiny_llama, tmp_path, more):
    """There both models have the same inputs."""
    masks, weights = pruned(tiny_llama, tmp_path / "pruned", *more)
    dense_masks, dense_weights = pruned(tiny_llama, tmp_path / "dense", *more, DENSE)
    dense_masks.check_patterns()
    for name in masks:
        first = bool(re.search(r"layers\.0.*[qkv]_proj", name))
        assert torch.equal(weights[name], dense_weights[name]) == first, name
        assert not first or torch.equal(masks[name], dense_masks[name])
        assert (dense_weights[name][~dense_masks[name]] == 0).all()
    assert "dense target to 2:4" in (tmp_path / "dense/model/README.md").read_text()
    assert "dense target" not in (tmp_path / "pruned/model/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("more", [LEAST_SQUARES, ("prune.method=sparsegpt",)])
def test_outputs_are_closer_to_the_dense_model(stories, hub, tmp_path, more):
    more += (f"mirror={hub}", "calibration.dataset=local/stories", "calibration.seq_len=128")
    windows = calibration_windows(stories, *more)
    expected = seen(AutoModelForCausalLM.from_pretrained(stories), windows, outputs=True)
    errors = {}
    for target in ("pruned", "dense"):
        pruned(stories, tmp_path / target, *more, f"prune.target={target}")
        given = seen(AutoModelForCausalLM.from_pretrained(tmp_path / target / "model"), windows, outputs=True)
        errors[target] = {
            name: float((given[name] - out).square().sum() / out.square().sum()) for name, out in expected.items()
        }
    assert sum(errors["dense"].values()) < 0.95 * sum(errors["pruned"].values())


def test_a_layer_may_stay_dense(tiny_llama, tmp_path):
    masks, weights = pruned(tiny_llama, tmp_path, *LEAST_SQUARES, DENSE, 'prune.overrides={"*.layers.0.*": dense}')
    assert masks and not any(".layers.0." in name for name in masks)
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert all(torch.equal(weights[name], dense[name]) for name in dense if ".layers.0." in name)


@pytest.mark.slow
def test_the_api_gives_the_same_as_the_command(tiny_llama, tmp_path):
    more = ("prune.method=wanda", "prune.refine=swaps", "prune.sparsity=0.6", *LEAST_SQUARES)
    masks, weights = pruned(tiny_llama, tmp_path / "p", *more, DENSE)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    chosen = {"refine": "swaps", "update": "least_squares", "target": "dense"}
    found = espalier.prune(model, sparsity=0.6, calibration=calibration_windows(tiny_llama, *more), **chosen)
    assert all(torch.equal(mask, found[name]) for name, mask in masks.items())
    state = model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hrm_text", "zamba2", "gemma4_text", "opt", "gpt2"])
def test_models_that_call_their_layers_in_unusual_ways(family):
    model = families.tiny(family)
    masks = espalier.prune(model, calibration=families.text(4, 32), method="sparsegpt", sparsity=0.5, target="dense")
    masks.check_patterns()
    espalier.verify(model, masks)


def test_experts_are_refused_and_may_stay_dense():
    text, chosen = families.text(4, 32), {"method": "sparsegpt", "sparsity": 0.5, "target": "dense"}
    with pytest.raises(UserError, match="experts.* belongs to an expert.*: set target=pruned"):
        espalier.prune(families.tiny("mixtral"), calibration=text, **chosen)
    masks = espalier.prune(families.tiny("mixtral"), calibration=text, overrides={"*experts*": "dense"}, **chosen)
    assert len(masks) and not any("experts" in name for name in masks)


@pytest.mark.parametrize(
    "more, says",
    [
        ((), "prune.method=wanda with prune.update=none leaves them: set prune.update=least_squares"),
        (("prune.method=dsnot",), "set prune.update=least_squares"),
        (("prune.method=sparsegpt", "calibration.activations=dense"), "set prune.target=pruned, or calibration"),
        (
            ("prune.update=obs", "prune.group=layer", "prune.sparsity=0.5"),
            "set prune.group=auto, or prune.target=pruned",
        ),
        (("prune.method=sparsegpt", "prune.target=dnese"), "did you mean 'dense'?"),
    ],
)
def test_what_it_has_no_effect_on_is_refused(more, says):
    with pytest.raises(UserError, match=re.escape(says)):
        reader.load(["model=m", "stages=[prune]", DENSE, *more])


def test_methods_that_update_weights_are_accepted(tmp_path):
    for more in ("method=wanda_seq", "method=magnitude_iter", "update=admm"):
        reader.load(["model=m", "stages=[prune]", DENSE, f"prune.{more}"])
    recipe = reader.load(["model=m", "stages=[prune]", DENSE, "prune.method=sparsegpt"])
    assert "2504.02692" in registry.describe(recipe)["prune.target"]["citation"]


@pytest.mark.slow
def test_a_method_without_a_gram_matrix_is_refused(tiny_llama, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from pipeline.pruning.score_methods import Wanda\nclass Mine(Wanda):\n    updates_weights = True\n"
    )
    with pytest.raises(UserError, match="Mine sums no Gram matrix: set prune.update=obs or prune.target=pruned"):
        pruned(tiny_llama, tmp_path / "p", f"prune.method={tmp_path}/mine.py", DENSE)


def test_the_memory_plan_counts_the_second_model(capsys):
    model, batches = families.tiny("llama"), [families.text(64, 128)] * 4
    planned = []
    for target in ("pruned", "dense"):
        chosen = Prune(method="sparsegpt", target=target)
        prune.plan_memory(model, batches, prune_method(chosen, {}))
        line = capsys.readouterr().out
        planned.append({key: float(re.search(rf"([\d.]+) MiB {key}", line)[1]) for key in ("to", "of hidden")})
        assert f"for {'two' if target == 'pruned' else 'three'} layers" in line
    assert planned[1]["of hidden"] == pytest.approx(2 * planned[0]["of hidden"], abs=0.1)
    assert planned[1]["to"] > 1.2 * planned[0]["to"]


def test_damaged_weights_are_named(tiny_llama, tmp_path):
    folder = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(folder)
    processors.tokenizer(tiny_llama, settings(tiny_llama)).save_pretrained(folder)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds weights that are not finite"):
        pruned(folder, tmp_path / "p", *LEAST_SQUARES, DENSE)
