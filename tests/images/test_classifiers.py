"""Laws of tiny image classifiers of each family: the walk is the model's forward, the masks are those of a plain loop, and an
ordinary load gives the pruned model."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, SwinForImageClassification

from pipeline import tasks
from pipeline.engine.blocks import find_blocks
from pipeline.engine.layerwise import LayerwiseForwards
from pipeline.models import loading
from pipeline.models.verification import check_matrices
from pipeline.reporting import series
from pipeline.settings.schema import Calibration, Prune, Recipe
from pipeline.sparsity.masks import Masks
from pipeline.stages import prune as prune_stage
from tests.images.classifiers import FAMILIES, TIMM, pixels, tiny

BATCHES = [pixels(2, seed) for seed in range(3)] + [pixels(1, 3)]
ALL = [*FAMILIES, *TIMM]
# of all stages; others have two
LAYERS = {"mixer_s16_224": 8, "ConvNext": 3, "ConvNextV2": 3, "Swin": 3, "Swinv2": 3, "swin_tiny_patch4_window7_224": 3}


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_walk_equals_the_forward_to_the_bit(name):
    model = tiny(name)
    expected = [model(pixel_values=batch).logits for batch in BATCHES]
    blocks = find_blocks(model)
    assert len(blocks) == LAYERS.get(name, 2)
    with LayerwiseForwards(model, blocks, model, BATCHES, torch.device("cpu")) as walk:
        found = []
        walk.start()
        while walk.current is not None:
            for i in range(len(BATCHES)):
                walk.run_block(i)  # repeatable: it changes nothing
            found += walk.advance()
    assert all(torch.equal(one.logits, other) for one, other in zip(found, expected, strict=True))


def test_the_configuration_decides_what_a_classifier_is():
    """Not the class, which of a model with its own code may not say what it reads."""

    class OwnCode(SwinForImageClassification):
        main_input_name = "input_ids"

    model = OwnCode(tiny("Swin").config)
    assert not tasks.of(model.config).reads_text
    assert [block.name for block in find_blocks(model)] == [block.name for block in find_blocks(tiny("Swin"))]


@torch.no_grad()
def plain_masks(model: nn.Module, activations: str, group: str, ratio: float) -> dict[str, torch.Tensor]:
    """Wanda as in the reference, layer after layer: whole forwards of the model, hooks, and a loop over rows or one sort of a
    layer's scores."""
    masks, inputs = {}, {}

    def hook(name):
        def add(module, args, out):
            squares = args[0].flatten(0, -2).float().square().double().sum(0)
            inputs[name] = inputs.get(name, 0) + squares

        return add

    for block in find_blocks(model):
        linears = {f"{block.name}.{n}.weight": m for n, m in block.module.named_modules() if isinstance(m, nn.Linear)}
        if activations == "pruned" or not masks:
            inputs.clear()
            every = {f"{b.name}.{n}.weight": m for b in find_blocks(model) for n, m in b.module.named_modules()}
            hooks = [m.register_forward_hook(hook(n)) for n, m in every.items() if isinstance(m, nn.Linear)]
            for batch in BATCHES:
                model(pixel_values=batch)
            for it in hooks:
                it.remove()
        linears = {name: module for name, module in linears.items() if name in inputs}
        scores = {name: module.weight.abs() * inputs[name].sqrt().float() for name, module in linears.items()}
        kept = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        if group == "row":
            for name, score in scores.items():
                for row in range(len(score)):
                    kept[name][row, score[row].sort(stable=True).indices[: int(score.shape[1] * ratio)]] = False
        else:
            ordered = torch.cat([score.flatten() for score in scores.values()]).sort().values
            kept = {name: score > ordered[int(len(ordered) * ratio)] for name, score in scores.items()}
        masks |= kept
        if activations == "pruned":
            for name, mask in kept.items():
                linears[name].weight.mul_(mask)
    return masks


@pytest.mark.parametrize("activations", ["dense", "pruned"])
@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("name", ALL)
def test_the_masks_are_those_of_a_plain_loop(name, group, activations):
    recipe = Recipe(
        model="in memory",
        calibration=Calibration(activations=activations),
        prune=Prune(sparsity=0.5, group=group),
    )
    model = tiny(name)
    masks = prune_stage.in_memory(model, BATCHES, recipe)
    expected = plain_masks(tiny(name), activations, group, 0.5)
    assert set(masks) == set(expected)
    for matrix in masks:
        assert torch.equal(masks[matrix], expected[matrix]), matrix
    assert not masks.violations(model.named_parameters())


METHODS = {
    "sparsegpt": {},
    "magnitude": {"allocation": "owl", "sparsity": 0.6},
    "ria": {"refine": "swaps"},
    "wanda": {"update": "least_squares"},
    "dsnot": {"sparsity": 0.5},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["ConvNextV2", "Swin"])
def test_other_methods_keep_their_patterns(name, method):
    recipe = Recipe(model="in memory", prune=Prune(**{"method": method, "sparsity": "2of4"} | METHODS[method]))
    model = tiny(name)
    masks = prune_stage.in_memory(model, BATCHES, recipe)
    masks.check_patterns()
    assert not masks.violations(model.named_parameters())
    # OWL's ratios have this mean over layers, whose sizes differ here
    assert masks.sparsity() == pytest.approx(METHODS[method].get("sparsity", 0.5), abs=0.05)
    assert model(BATCHES[0]).logits.isfinite().all()


def test_the_layers_of_stages_are_layers_in_the_report():
    names = [
        f"swin.encoder.layers.{s}.blocks.{b}.attention.{m}.weight" for s, b in ((0, 0), (0, 1), (1, 0)) for m in "qk"
    ]
    rows = [{"layer": str(i // 2), "matrix": name, "sparsity": "0.5"} for i, name in enumerate(names)]
    assert list(series.by_type(rows, "sparsity").columns) == ["q", "k"]


@pytest.mark.parametrize("name", ALL)
def test_an_ordinary_load_gives_the_pruned_model(name, tmp_path):
    """The stage's files, with their own names, hold what pruning in memory gives; everything outside the blocks is dense."""
    dense = tiny(name)
    dense.save_pretrained(tmp_path / "dense")
    overrides = {"*position_bias_mlp*": "dense"} if name == "Swinv2" else {}  # it has two inputs
    recipe = Recipe(model=str(tmp_path / "dense"), prune=Prune(sparsity="2of4", overrides=overrides))
    pruned = loading.load(tmp_path / "dense", recipe)
    assert tasks.of(pruned.config).unit == "images"
    masks = prune_stage.in_memory(pruned, BATCHES, recipe)
    pruned.save_pretrained(tmp_path / "pruned")
    masks.save(tmp_path / "masks.safetensors")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned").eval()
    with torch.no_grad():
        assert torch.equal(loaded(BATCHES[0]).logits, pruned(BATCHES[0]).logits)
    checked = check_matrices(tmp_path / "pruned", Masks.load(tmp_path / "masks.safetensors"), recipe)
    assert len(checked) == len(masks) and all(
        matrix.zeros == matrix.weights // 2 and not matrix.violation for matrix in checked
    )
    for (parameter, before), (_, after) in zip(dense.named_parameters(), loaded.named_parameters(), strict=True):
        assert (parameter in masks) != torch.equal(before, after), parameter
