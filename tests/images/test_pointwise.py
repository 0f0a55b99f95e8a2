"""1x1 convolutions that are pruned like Linear layers, with `prune.pointwise=true`."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModelForImageClassification

from pipeline.compact import compact_model
from pipeline.compact.export import export
from pipeline.engine.blocks import find_blocks
from pipeline.engine.layerwise import LayerwiseForwards
from pipeline.models import loading
from pipeline.models.pointwise import mark_pointwise
from pipeline.recovery import lora
from pipeline.recovery.layer_fit import token_error
from pipeline.recovery.training import fit
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune, Prune, Recipe
from pipeline.sparsity.masks import Masks, apply_
from pipeline.stages import finetune
from pipeline.stages import prune as prune_stage
from tests.images.classifiers import SIZE, pixels

BATCHES = [pixels(2, seed) for seed in range(3)]
FAMILIES = {
    "PoolFormer": {
        **{
            "hidden_sizes": [8, 16],
            "depths": [2, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
        },
        **{"padding": [2, 1], "mlp_ratio": 2.0},
    },
    "ResNet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "bottleneck"},
    "TimmWrapper": {
        "architecture": "convnext_atto",
        "model_args": {"depths": (1, 1, 1, 2), "dims": (8, 8, 16, 16), "conv_mlp": True, "patch_size": 2},
    },
}


def tiny(name: str) -> nn.Module:
    if name == "TimmWrapper":
        pytest.importorskip("timm")
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name], num_labels=3, image_size=SIZE)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    return model


def recipe(**prune) -> Recipe:
    return Recipe(model="in memory", prune=Prune(pointwise=True, **prune))


def pointwise(model: nn.Module) -> dict[str, nn.Conv2d]:
    """By weight name, the convolutions inside blocks that act as Linear."""
    inside = {module for block in find_blocks(model) for module in block.module.modules()}
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module in inside and (*module.kernel_size, *module.stride) == (1, 1, 1, 1)
    }


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_masks_are_those_of_a_loop_over_pixels(name):
    dense, pruned = tiny(name), tiny(name)
    expected = {}
    masks = prune_stage.in_memory(pruned, BATCHES, recipe(method="wanda", sparsity=0.5))
    mark_pointwise(dense)
    convolutions = pointwise(dense)
    assert set(masks) == set(convolutions)
    for block in find_blocks(dense):  # in the order of the walk; each layer sees the pruned ones before it
        squares = {}

        def hook(module, args, out, squares=squares):
            by_pixel = args[0].permute(0, 2, 3, 1).reshape(-1, module.in_channels)
            squares[module] = squares.get(module, 0) + by_pixel.square().double().sum(0)

        own = {n: m for n, m in convolutions.items() if m in set(block.module.modules())}
        hooks = [module.register_forward_hook(hook) for module in own.values()]
        for batch in BATCHES:
            dense(pixel_values=batch)
        for it in hooks:
            it.remove()
        for weight, module in own.items():
            score = module.weight[:, :, 0, 0].abs() * squares[module].sqrt().float()
            kept = torch.ones_like(score, dtype=torch.bool)
            for row, scores in enumerate(score):
                kept[row, scores.sort(stable=True).indices[: len(scores) // 2]] = False
            expected[weight] = kept[..., None, None]
            apply_(module.weight, expected[weight])
    for weight, mask in expected.items():
        assert torch.equal(masks[weight], mask), weight
    assert torch.equal(dense(BATCHES[0]).logits, pruned(BATCHES[0]).logits)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
@pytest.mark.slow
def test_a_walk_equals_the_forward_to_the_bit(name):
    model = mark_pointwise(tiny(name))
    expected = [model(pixel_values=batch).logits for batch in BATCHES]
    with LayerwiseForwards(model, find_blocks(model), model, BATCHES, torch.device("cpu")) as walk:
        found = []
        walk.start()
        while walk.current is not None:
            found += walk.advance()
    assert all(torch.equal(one.logits, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"method": "sparsegpt"}, {"update": "least_squares", "refine": "swaps"}])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_model_is_saved_exported_and_fine_tuned(name, method, tmp_path):
    tiny(name).save_pretrained(tmp_path / "dense")
    settings = recipe(sparsity="2of4", **method)
    pruned = loading.load(tmp_path / "dense", settings)
    masks = prune_stage.in_memory(pruned, BATCHES, settings)
    masks.check_patterns()
    assert masks.sparsity() == 0.5 and not masks.violations(pruned.named_parameters())
    pruned.save_pretrained(tmp_path / "pruned")
    masks.save(tmp_path / "masks.safetensors")
    ordinary = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned").eval()
    before, after = export(
        tmp_path / "pruned", Masks.load(tmp_path / "masks.safetensors"), tmp_path / "compact", settings
    )
    assert after < 0.6 * before
    compact = compact_model.load_compact(tmp_path / "compact")
    with torch.no_grad():
        expected = pruned(BATCHES[0]).logits
        assert torch.equal(ordinary(BATCHES[0]).logits, expected)
        assert torch.equal(compact(BATCHES[0]).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_lora_merges_to_what_it_computes(name):
    model = tiny(name)
    masks = prune_stage.in_memory(model, BATCHES, recipe(sparsity="2of4"))
    lora.attach(model, masks, Finetune(rank=2, alpha=4.0))
    layers = lora.masked_layers(model)
    assert len(layers) == len(masks)
    for layer in layers.values():
        nn.init.normal_(layer.b)
    labels = torch.tensor([0, 1])
    logits = model(BATCHES[0]).logits
    F.cross_entropy(logits, labels).backward()
    for layer in layers.values():
        assert layer.a.grad.abs().sum() > 0 and layer.b.grad.abs().sum() > 0 and layer.nonzero_pruned == 0
    plain = tiny(name)
    parameters = dict(plain.named_parameters())
    for weight, layer in layers.items():
        parameters[weight].data.copy_(layer.merged_weight())
    assert not masks.violations(plain.named_parameters())
    assert torch.equal(plain(BATCHES[0]).logits, logits)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_batch_norms_keep_their_statistics_in_training(method, tmp_path):
    model = tiny("ResNet")
    masks = prune_stage.in_memory(model, BATCHES, recipe(sparsity="2of4"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    samples = [(batch[0], torch.tensor(index)) for index, batch in enumerate(BATCHES)] * 2
    settings = Finetune(method=method, max_steps=3, batch_size=2, accumulate=1, precision="32-true", rank=2)
    finetune.train(model, masks, samples, None, settings, 0, tmp_path)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if name in before)


def test_a_model_that_cannot_recompute_activations_is_refused_before_it_is_pruned(tmp_path):
    model, settings = tiny("ResNet"), Finetune(checkpoint_activations=True, max_steps=1)
    model.save_pretrained(tmp_path / "model")
    asked = Recipe(model=str(tmp_path / "model"), stages=["prune", "finetune"], finetune=settings)
    with pytest.raises(
        UserError, match="ResNetForImageClassification cannot .* set finetune.checkpoint_activations=false"
    ):
        finetune.check(asked)
    with pytest.raises(UserError, match="set finetune.checkpoint_activations=false"):
        fit(model, [(BATCHES[0][0], torch.tensor(0))] * settings.batch_size, settings, 0, tmp_path)


def test_the_error_of_a_reconstruction_is_by_pixel():
    target = torch.rand(2, 8, 4, 4).sub(0.8).relu()  # (B, C, H, W); most channels of a pixel are zero
    out = target + torch.rand(2, 8, 4, 4) / 10
    by_pixel = token_error(out, target, features=1)
    torch.testing.assert_close(by_pixel, token_error(out.movedim(1, -1), target.movedim(1, -1)))
    assert token_error(out, target.masked_fill(torch.rand(2, 1, 4, 4) < 0.7, 0), features=1) < 100 * by_pixel


def test_without_the_key_convolutions_stay_dense():
    with pytest.raises(UserError, match="prune.pointwise=true"):
        prune_stage.in_memory(tiny("PoolFormer"), BATCHES, Recipe(model="in memory", prune=Prune(sparsity=0.5)))
