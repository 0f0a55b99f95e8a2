"""A masked LoRA has the mask in its forward and gradients, and its merged weights compute exactly the same."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.engine.matrices import matrices_of
from pipeline.recovery import adapter_files, lora
from pipeline.recovery.lora import MaskedLinear
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune
from pipeline.sparsity.masks import Masks, apply_
from pipeline.sparsity.patterns import NofM
from tests.engine.test_decoder import small_model


def with_masks(model) -> tuple[nn.Module, Masks]:
    """Prunes 2 of 4 along the inputs of every matrix in the model's layers, fused experts included."""
    masks = Masks()
    for name, matrix in matrices_of(model).items():
        mask_OI = NofM(2, 4).select(torch.rand(matrix.weight_OI.shape))
        apply_(matrix.weight_OI, mask_OI)
        masks.add(name, matrix.stored(mask_OI), "2of4", matrix.transposed)
    return model, masks


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    """Takes some optimizer steps, with `reapply` after each as MaskKeeper does."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(steps):
        ids = torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lora.refresh_all(model)
    return model.eval()


FAMILIES = ["llama", "gpt2", "opt", "bloom"]
SETTINGS = Finetune(rank=4, alpha=8.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_at_the_start_nothing_changes(family, cached):
    model, masks = with_masks(small_model(family))
    ids = torch.randint(3, 61, (2, 16))
    before = model(input_ids=ids).logits
    torch.testing.assert_close(
        lora.attach(model, masks, SETTINGS, cached)(input_ids=ids).logits, before, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(("dropout", "cached"), [(0.0, True), (0.0, False), (0.3, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_equals_forward_and_is_exactly_sparse(family, dropout, cached):
    model, masks = with_masks(small_model(family))
    plain = copy.deepcopy(model)
    settings = Finetune(rank=4, alpha=8.0, dropout=dropout)
    adapted = trained(lora.attach(model, masks, settings, cached))
    merged = {name: layer.merged_weight() for name, layer in lora.masked_layers(adapted).items()}
    assert set(merged) == set(masks)
    assert masks.violations(iter(merged.items())) == []
    assert any(not torch.equal(merged[name], plain.get_parameter(name)) for name in merged)
    plain.load_state_dict(merged, strict=False)
    ids = torch.randint(3, 61, (2, 16))
    with torch.no_grad():
        forward = adapted(input_ids=ids).logits
        torch.testing.assert_close(plain.eval()(input_ids=ids).logits, forward, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_and_recomputed_weights_are_equal_in_mixed_precision(dtype):
    settings = Finetune(rank=4, alpha=8.0, bias="lora_only")
    found = []
    for cached in (True, False):
        torch.manual_seed(0)
        adapted = lora.attach(*with_masks(small_model("opt").to(dtype)), settings, cached=cached)
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            trained(adapted)
            found.append([layer.merged_weight() for layer in lora.masked_layers(adapted).values()])
            ids = torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(9))
            loss = adapted(input_ids=ids, labels=ids).loss
            layer = next(iter(lora.masked_layers(adapted).values()))
            x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
            bias = layer.get_base_layer().bias.bfloat16()
            out = layer(x)
        loss.backward()
        found[-1] += [p.grad for p in adapted.parameters() if p.grad is not None]
        expected = nn.functional.linear(x.bfloat16(), layer.merged_weight().bfloat16(), bias)
        assert torch.equal(out, expected)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_merged_model_equals_forward_in_bfloat16():
    model, masks = with_masks(small_model("llama").bfloat16())
    plain = copy.deepcopy(model)
    adapted = trained(lora.attach(model, masks, SETTINGS))
    merged = {name: layer.merged_weight() for name, layer in lora.masked_layers(adapted).items()}
    plain.load_state_dict(merged, strict=False)
    ids = torch.randint(3, 61, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=2e-2, rtol=0)
    assert masks.violations(iter(merged.items())) == []


def test_gradients_include_the_mask():
    base = nn.Linear(24, 16)
    mask = NofM(2, 4).select(torch.rand(16, 24))
    apply_(base.weight.data, mask)
    layer = MaskedLinear(base, "default", LoraConfig(r=3, lora_alpha=6), r=3, lora_alpha=6)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.set_mask(mask)
    x = torch.randn(2, 5, 24, requires_grad=True)
    weight = torch.randn(2, 5, 16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    expected_out = nn.functional.linear(x, base.weight + mask * (layer.scaling["default"] * b @ a), base.bias)
    expected = torch.autograd.grad((expected_out * weight).sum(), (x, a, b))
    out = layer(x)
    torch.testing.assert_close(out, expected_out)
    for mine, theirs in zip(torch.autograd.grad((out * weight).sum(), (x, a, b)), expected):
        torch.testing.assert_close(mine, theirs)


def test_the_saved_adapter_restores_the_model(tmp_path):
    model, masks = with_masks(small_model("llama"))
    pruned = copy.deepcopy(model)
    adapted = trained(lora.attach(model, masks, SETTINGS))
    masks.save(tmp_path / "masks.safetensors")
    adapter_files.save_adapter(adapted, tmp_path / "masks.safetensors", tmp_path / "adapter")
    ids = torch.randint(3, 61, (2, 16))
    with torch.no_grad():
        again = adapter_files.load_adapter(copy.deepcopy(pruned), tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, adapted(input_ids=ids).logits)
        adapter_files.load_adapter(copy.deepcopy(pruned).bfloat16(), tmp_path / "adapter")
        other = copy.deepcopy(pruned)
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
        for base in (other, copy.deepcopy(other).bfloat16()):
            with pytest.raises(
                UserError, match="was trained on other weights than the model has in model.layers.1.mlp.up"
            ):
                adapter_files.load_adapter(base, tmp_path / "adapter")
    with pytest.raises((KeyError, ValueError), match="MASKED_LORA"):  # as a dense LoRA it would lose the sparsity
        PeftModel.from_pretrained(pruned, tmp_path / "adapter")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@torch.no_grad()
def test_an_adapter_with_biases_runs_on_a_model_of_16_bits(tmp_path, bias):
    """Training has its biases in float32, which norms and convolutions of 16 bits refuse."""
    pruned, masks = with_masks(small_model("gpt2").bfloat16())
    masks.save(tmp_path / "masks.safetensors")
    settings = Finetune(rank=4, bias=bias, precision="bf16-mixed")
    adapted = lora.attach(copy.deepcopy(pruned), masks, settings)
    adapter_files.save_adapter(adapted, tmp_path / "masks.safetensors", tmp_path / "adapter")
    again = adapter_files.load_adapter(copy.deepcopy(pruned), tmp_path / "adapter")
    ids = torch.randint(3, 61, (2, 16))
    assert torch.equal(again(ids).logits, pruned(ids).logits)  # B is zero


def test_bad_input_says_what_to_set(tmp_path):
    model, masks = with_masks(small_model("llama"))
    with pytest.raises(
        UserError, match=r"no pruned matrix is called 'query': set some of down_proj, gate_proj.*or all"
    ):
        lora.attach(model, masks, Finetune(targets=["query"]))
    with pytest.raises(UserError, match="no masked LoRA"):
        adapter_files.load_adapter(model, tmp_path)
    with pytest.raises(UserError, match="DoRA"):
        MaskedLinear(nn.Linear(4, 4), "default", LoraConfig(r=2, use_dora=True), r=2, lora_alpha=2)
    masks.add(next(iter(masks)), torch.ones(2, 2, dtype=torch.bool), "2of4")
    with pytest.raises(UserError, match="another model's mask file"):
        lora.attach(small_model("llama"), masks, SETTINGS)


def test_targets_choose_by_the_end_of_the_name():
    model, masks = with_masks(small_model("llama"))
    chosen = lora.masked_layers(lora.attach(model, masks, Finetune(targets=["q_proj", "v_proj"])))
    assert {name.split(".")[-2] for name in chosen} == {"q_proj", "v_proj"}
    assert len(chosen) == 2 * 3


def test_the_merged_file_equals_forward_on_a_real_model(stories):
    model = AutoModelForCausalLM.from_pretrained(stories)
    model, masks = with_masks(model)
    adapted = trained_on(lora.attach(model, masks, SETTINGS), vocabulary=500)
    ids = torch.randint(3, 500, (2, 64))
    plain = AutoModelForCausalLM.from_pretrained(stories)
    plain.load_state_dict({n: layer.merged_weight() for n, layer in lora.masked_layers(adapted).items()}, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def trained_on(model: nn.Module, vocabulary: int) -> nn.Module:
    ids = torch.randint(3, vocabulary, (2, 32))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    lora.refresh_all(model)
    return model.eval()
