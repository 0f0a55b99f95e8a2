"""Fused experts, and weights used outside of a Linear's forward, train like a masked Linear, in every family."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.recovery import adapter_files, lora, sharding, training
from pipeline.recovery.lora import MaskedLinear, MaskedParameter
from pipeline.recovery.methods import MaskedLora, PlainLora, SparseFull
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.settings.schema import Finetune
from pipeline.sparsity.masks import Masks, apply_
from pipeline.stages import finetune
from pipeline.tasks.language_modeling import LanguageModeling
from tests import families, launches
from tests.families import tiny
from tests.recovery.test_lora import with_masks

FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "olmoe",
    "granitemoe",
    "gpt_oss",
    "llama4_text",
    "jetmoe",
    "deepseek_v3",
    "deepseek_v4",
    "mamba",
    "falcon_mamba",
    "mamba2",
    "zamba2",
    "qwen3_next",
    "git",
)
SETTINGS = Finetune(rank=4, alpha=8.0)


def ids(seed: int) -> torch.Tensor:
    return torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=ids(9), use_cache=False).logits


def train(recovery, steps: int = 3) -> nn.Module:
    model = recovery.model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        LanguageModeling().cross_entropy(model(input_ids=ids(step), use_cache=False).logits, ids(step)).backward()
        recovery.mask_gradients()
        optimizer.step()
        optimizer.zero_grad()
        assert recovery.reapply() == 0
    return model.eval()


def merged_into(plain: nn.Module, recovery) -> nn.Module:
    new = {name: recovery.merged(name, weight) for name, weight in plain.state_dict().items()}
    plain.load_state_dict({name: weight.detach() for name, weight in new.items() if weight is not None}, strict=False)
    return plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_the_merged_model_equals_forward_is_exactly_sparse_and_reloads(family, tmp_path):
    model, masks = with_masks(tiny(family))
    pruned, again, before = copy.deepcopy(model), copy.deepcopy(model), logits(model)
    recovery = MaskedLora(model, masks, SETTINGS)
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)
    after = logits(train(recovery))
    layers = lora.masked_layers(model)
    assert layers.keys() == {lora.parameter_of(name) for name in masks}
    idle = {name for name, layer in layers.items() if not layer.b.any()}
    # text does not reach an image encoder, and a short text does not reach modules that compress long ones
    assert all("image_encoder" in name or "compressor" in name for name in idle), idle
    plain = merged_into(copy.deepcopy(pruned), recovery)
    torch.testing.assert_close(logits(plain), after, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)
    assert masks.violations(plain.named_parameters()) == []

    masks.save(tmp_path / "masks.safetensors")
    recovery.save(tmp_path, tmp_path / "masks.safetensors")
    assert torch.equal(logits(adapter_files.load_adapter(again, tmp_path / "adapter")), after)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_training_keeps_masks_and_buffers(family):
    model, masks = with_masks(tiny(family))
    plain, recovery = copy.deepcopy(model), SparseFull(model, masks, Finetune(method="full"))
    after = logits(train(recovery, 1))
    torch.testing.assert_close(logits(merged_into(plain, recovery)), after, atol=1e-5, rtol=1e-5)
    assert masks.violations(plain.named_parameters()) == []
    assert all(recovery.merged(name, buffer) is None for name, buffer in model.named_buffers())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(16, 24), (3, 16, 24)])
def test_gradients_include_the_mask(shape, transposed):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape), requires_grad=False)
    mask = torch.rand(shape) < 0.5
    apply_(module.weight.data, mask)
    base = module.weight.detach().clone()
    masked = MaskedParameter(module, "weight", 4, 2.0, transposed)
    masked.set_mask(mask, [])
    nn.init.normal_(masked.lora_B)
    delta = 2.0 * masked.b @ masked.a
    expected, grad = mask * (base + (delta.mT if transposed else delta)), torch.randn(shape)
    torch.testing.assert_close(module.weight, expected)
    assert torch.equal(module.weight, masked.merged_weight())
    kept = grad.clone()
    for mine, theirs in zip(
        torch.autograd.grad(module.weight, (masked.a, masked.b), grad),
        torch.autograd.grad(expected, (masked.a, masked.b), grad),
    ):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(grad, kept)  # others may use it


@pytest.mark.parametrize("family", ["mixtral", "jetmoe", "falcon_mamba"])
def test_effective_weights_are_computed_once_per_forward_and_backward(family, monkeypatch):
    made = []
    for kind in (MaskedParameter, MaskedLinear):
        effective = kind.effective_weight
        monkeypatch.setattr(
            kind, "effective_weight", lambda self, *args, of=effective: (made.append(self), of(self, *args))[1]
        )
    recovery = MaskedLora(*with_masks(tiny(family)), SETTINGS)
    train(recovery, 1)
    made.clear()
    loss = LanguageModeling().cross_entropy(recovery.model.train()(input_ids=ids(0), use_cache=False).logits, ids(0))
    once = len(made)
    assert once == len(set(made)) > 0
    loss.backward()
    # fewer if backward needs no weight, as in the first block
    assert max(made.count(masked) for masked in made) == 2


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "falcon_mamba"])
def test_checkpointed_activations_give_the_same_gradients(family):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        model, masks = with_masks(tiny(family))
        recovery = MaskedLora(model, masks, Finetune(rank=4, checkpoint_activations=checkpointed))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train(recovery)
        found.append({name: layer.merged_weight() for name, layer in recovery.layers.items()})
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_any_implementation_of_experts_sees_the_effective_weights(implementation):
    model, masks = with_masks(tiny("gpt_oss"))
    recovery = MaskedLora(model, masks, SETTINGS)
    model.set_experts_implementation(implementation)
    plain = merged_into(with_masks(tiny("gpt_oss"))[0], recovery)
    train(recovery)
    torch.testing.assert_close(logits(merged_into(plain, recovery)), logits(model), atol=1e-5, rtol=1e-5)


def test_experts_that_no_token_reaches_get_no_gradient():
    model, masks = with_masks(tiny("gpt_oss"))
    recovery = MaskedLora(model, masks, SETTINGS)
    for layer in model.model.layers:
        layer.mlp.router.bias.data[2:] = -100.0
    train(recovery)
    for name, layer in recovery.layers.items():
        if "experts" in name:
            assert layer.b[0].any() and not layer.b[2:].any(), name


def test_experts_without_a_mask_do_not_change():
    model, masks = with_masks(tiny("mixtral"))
    some = Masks()
    some.packed = {name: mask for name, mask in masks.packed.items() if not name.endswith("[2]")}
    plain = copy.deepcopy(model)
    recovery = MaskedLora(model, some, SETTINGS)
    train(recovery)
    for name, layer in recovery.layers.items():
        if "experts" in name:
            assert torch.equal(layer.merged_weight()[2], plain.get_parameter(name)[2])
            assert not torch.equal(layer.merged_weight()[1], plain.get_parameter(name)[1])


def test_mixed_precision_and_bfloat16_use_the_merged_weights():
    model, masks = with_masks(tiny("mixtral"))
    recovery = MaskedLora(model, masks, SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        train(recovery)
        for name, layer in recovery.layers.items():
            if isinstance(layer, MaskedParameter):
                module, _, attribute = name.rpartition(".")
                read = getattr(model.get_submodule(module), attribute)
                assert torch.equal(read, layer.merged_weight().bfloat16())
    model, masks = with_masks(tiny("mixtral").bfloat16())
    plain, recovery = copy.deepcopy(model), MaskedLora(model, masks, SETTINGS)
    train(recovery)
    torch.testing.assert_close(logits(merged_into(plain, recovery)), logits(model), atol=2e-2, rtol=0)
    assert masks.violations(plain.named_parameters()) == []


def test_targets_name_fused_experts_too():
    model, masks = with_masks(tiny("mixtral"))
    chosen = lora.masked_layers(lora.attach(model, masks, Finetune(targets=["gate_up_proj", "q_proj"])))
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in chosen} == {"gate_up_proj", "q_proj"}
    some = SparseFull(*with_masks(tiny("mixtral")), Finetune(method="full", targets=["gate_up_proj"]))
    assert {n.rpartition(".")[2] for n, p in some.model.named_parameters() if p.requires_grad} == {"gate_up_proj"}


def test_masks_of_other_experts_are_refused():
    _, masks = with_masks(tiny("mixtral"))
    with pytest.raises(UserError, match=r"experts.\w+\[3\] has shape .*another model's mask file"):
        lora.attach(tiny("mixtral", num_local_experts=3), masks, SETTINGS)
    with pytest.raises(UserError, match=r"gate_up_proj\[0\] has shape .*another model's mask file"):
        lora.attach(tiny("mixtral", intermediate_size=32), masks, Finetune(targets=["gate_up_proj"]))
    with pytest.raises(UserError, match="the model has no .*another model's mask file"):
        lora.attach(tiny("jetmoe"), masks, SETTINGS)


@pytest.mark.parametrize(
    ("family", "wanted"), [("mixtral", ["all"]), ("mamba2", ["out_proj"]), ("deepseek_v3", ["up_proj"])]
)
def test_a_plain_lora_refuses_what_peft_would_not_adapt(family, wanted):
    model, masks = with_masks(tiny(family))
    with pytest.raises(UserError, match="peft's LoRA cannot adapt exactly .*set other finetune.targets") as raised:
        PlainLora(model, masks, Finetune(method="plain_lora", targets=wanted))
    assert "\n" not in str(raised.value)
    PlainLora(*with_masks(tiny("mixtral")), Finetune(method="plain_lora", targets=["q_proj"]))


def test_a_plain_lora_is_refused_before_the_first_stage(tmp_path):
    families.save("mixtral", tmp_path)
    of = [f"model={tmp_path}", "stages=[prune,finetune]", "finetune.seq_len=32"]
    with pytest.raises(UserError, match="peft's LoRA cannot adapt exactly .*down_proj, gate_up_proj"):
        finetune.check(reader.load([*of, "finetune.method=plain_lora"]))
    finetune.check(reader.load([*of, "finetune.method=plain_lora", "finetune.targets=[q_proj]"]))
    finetune.check(reader.load(of))


def test_layers_with_shared_weights_are_not_sharded():
    with pytest.raises(UserError, match="set finetune.strategy=ddp"):
        sharding.shard_(tiny("zamba2"), mesh=None)


def test_only_the_target_is_adapted_if_names_have_the_same_suffix():
    """peft would also match `deep.layers.0.0` for `layers.0.0`."""

    def layers() -> nn.ModuleList:
        return nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])

    model = nn.Module()
    model.config = PreTrainedConfig()
    model.layers, model.other, model.deep = layers(), layers(), nn.Module()
    model.deep.layers = layers()
    masks = Masks()
    masks.add("layers.0.0.weight", torch.rand(8, 8) < 0.5, "0.5")
    assert lora.masked_layers(lora.attach(model, masks, SETTINGS)).keys() == {"layers.0.0.weight"}


LAUNCHED = ("gpt_oss", "git")  # text does not reach GIT's image encoder, which gets no gradient


def launched_training(folder: str, family: str, strategy: str) -> None:
    """Trains on the launched processes, and saves the model."""
    target = Path(folder) / f"{family}-{strategy}-{processes.world_size()}"
    target.mkdir(parents=True, exist_ok=True)
    usual = {"rank": 4, "max_steps": 3, "batch_size": 4, "precision": "32-true"}
    settings = Finetune(**usual, strategy=strategy, bias="all", lr=1e-2, weight_decay=10)  # which acts on zeros as well
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "git" else {}
    model, masks = with_masks(tiny(family, **no_dropout))
    plain, recovery = copy.deepcopy(model), MaskedLora(model, masks, settings)
    windows = torch.randint(3, 61, (12, 16), generator=torch.Generator().manual_seed(1))
    training.fit(recovery.model, windows, settings, 0, target)
    assert recovery.reapply() == 0
    merged_into(plain, recovery)
    if processes.is_main():
        assert masks.violations(plain.named_parameters()) == []
        torch.save(plain.state_dict(), target / "merged.pt")


@pytest.mark.slow
def test_two_processes_train_experts_as_one_by_ddp_and_by_fsdp(tmp_path):
    def work(rank: int) -> None:
        for family in LAUNCHED:
            for strategy in ("ddp", "fsdp"):
                launched_training(str(tmp_path), family, strategy)

    launches.run(("model=any", "stages=[prune]"), tmp_path / "log", of=2, work=work)
    for family in LAUNCHED:
        launched_training(str(tmp_path), family, "ddp")
        one, *two = (torch.load(tmp_path / f"{family}-{run}/merged.pt") for run in ("ddp-1", "ddp-2", "fsdp-2"))
        for name, weight in one.items():
            for other in two if not name.endswith("key.bias") else ():  # its gradient is nothing but rounding
                torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=1e-4, msg=f"{family} {name}")
