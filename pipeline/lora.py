"""Owns the masked LoRA: W + M * (scale * B A), the mask inside forward and merge, so that a merge is exactly sparse.

Shapes: O = out_features, I = in_features, R = rank, N = tokens.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline import files
from pipeline.errors import UserError
from pipeline.masks import Masks, apply_, stray
from pipeline.recipe import Finetune

ADAPTER = "default"
# peft knows no adapter of this type, so that its own loader refuses a folder which it would load as a dense LoRA
MASKED_TYPE = "MASKED_LORA"


class _EffectiveLinear(torch.autograd.Function):
    """x W_eff^T, with the gradients of A and B taken from the masked gradient of W_eff.

    No LoRA branch is computed for each token and nothing but x is kept for backward, which saves memory; the price is one
    product (O, N) x (N, I) in backward.
    """

    @staticmethod
    def forward(ctx, input_NI, weight_OI, bias_O, a_RI, b_OR, mask_OI, scale):
        ctx.save_for_backward(input_NI, weight_OI, a_RI, b_OR, mask_OI)
        ctx.scale = scale
        return F.linear(input_NI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx, grad_NO):
        input_NI, weight_OI, a_RI, b_OR, mask_OI = ctx.saved_tensors
        grad_input = grad_NO @ weight_OI if ctx.needs_input_grad[0] else None
        grad_OI = grad_NO.flatten(0, -2).T @ input_NI.flatten(0, -2)
        grad_OI = grad_OI.mul_(mask_OI).to(a_RI.dtype)
        grad_a = ctx.scale * (b_OR.T @ grad_OI)
        grad_b = ctx.scale * (grad_OI @ a_RI.T)
        return grad_input, None, None, grad_a, grad_b, None, None


class MaskedLinear(LoraLinear):
    """A LoRA layer of peft for Linear and Conv1D with a mask. `refresh` must follow each change of A or B."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs) -> None:
        if config.use_dora:
            raise UserError("DoRA cannot keep a mask: its magnitudes act on the whole of a row. Leave use_dora out")
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)  # weights stored (in, out)
        self.register_buffer("mask_OI", None, persistent=False)
        self.register_buffer("effective_OI", None, persistent=False)

    def set_mask(self, mask: Tensor) -> None:
        """`mask` in the shape of the stored weight."""
        weight = self.get_base_layer().weight
        self.mask_OI = self._oriented(mask).contiguous().to(weight.device)
        self.effective_OI = torch.empty(self.mask_OI.shape, dtype=weight.dtype, device=weight.device)
        self.refresh()

    def _oriented(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.fan_in_fan_out else tensor

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the effective weights anew from the pruned ones and A and B."""
        delta_OI = self.lora_B[ADAPTER].weight @ self.lora_A[ADAPTER].weight
        weight_OI = self._oriented(self.get_base_layer().weight)
        self.effective_OI.copy_(torch.add(weight_OI, delta_OI, alpha=self.scaling[ADAPTER]))
        apply_(self.effective_OI, self.mask_OI)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """M * (scale * B A) in the shape of the stored weight; peft's own merge goes through here."""
        return apply_(super().get_delta_weight(adapter), self._oriented(self.mask_OI))

    def merged_weight(self) -> Tensor:
        """The effective weights in the shape of the stored weight: what forward computes with, bit for bit."""
        return self._oriented(self.effective_OI)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        bias = self.get_base_layer().bias
        if bias is not None:
            bias = bias.to(x.dtype)
        if self.training and isinstance(self.lora_dropout[ADAPTER], nn.Dropout):
            # dropout acts on the input of the LoRA branch alone, so the two branches cannot share one product
            weight_OI = self._oriented(self.get_base_layer().weight).to(x.dtype)
            delta_OI = (b @ a * self.mask_OI * self.scaling[ADAPTER]).to(x.dtype)
            return F.linear(x, weight_OI, bias) + F.linear(self.lora_dropout[ADAPTER](x), delta_OI)
        weight_OI = self.effective_OI.to(x.dtype)
        return _EffectiveLinear.apply(x, weight_OI, bias, a, b, self.mask_OI, self.scaling[ADAPTER])


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """The masked layers by the name of the parameter that each adapts, such as model.layers.0.mlp.up_proj.weight."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}
    return {f"{name.removeprefix('base_model.model.')}.weight": module for name, module in found.items()}


def refresh_all(model: nn.Module) -> None:
    """Refreshes every masked layer and makes sure that no pruned weight left zero."""
    for name, layer in masked_layers(model).items():
        layer.refresh()
        if violation := stray(name, layer.effective_OI, layer.mask_OI):
            raise AssertionError(f"{violation.count} pruned weights of {name} are not zero")


def attach(model: nn.Module, masks: Masks, settings: Finetune) -> PeftModel:
    """`model` with a masked LoRA on the chosen matrices; only A and B train."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(masks, settings.targets),
        task_type="CAUSAL_LM",
    )
    return _with_masks(get_peft_model(model, _custom(config), adapter_name=ADAPTER), masks)


def save_adapter(model: PeftModel, masks_file: Path, folder: Path) -> None:
    """The adapter and its masks, in a folder that only `load_adapter` opens."""
    model.save_pretrained(folder)
    shutil.copyfile(masks_file, folder / "masks.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    files.write_json(folder / "adapter_config.json", config | {"peft_type": MASKED_TYPE})


def load_adapter(model: nn.Module, folder: str | Path) -> PeftModel:
    """The pruned `model` with the masked LoRA of `folder`, as it was trained."""
    folder = Path(folder)
    about = files.read_json(folder / "adapter_config.json")
    if about is None or about.get("peft_type") != MASKED_TYPE:
        raise UserError(
            f"{folder} holds no masked LoRA of this project (adapter_config.json with peft_type {MASKED_TYPE})"
        )
    masks, _ = Masks.load(folder / "masks.safetensors")
    config = LoraConfig.from_peft_type(**about | {"peft_type": "LORA"})
    loaded = PeftModel.from_pretrained(model, folder, adapter_name=ADAPTER, config=_custom(config))
    return _with_masks(loaded, masks)


def _custom(config: LoraConfig) -> LoraConfig:
    config._register_custom_module({nn.Linear: MaskedLinear, Conv1D: MaskedLinear})
    return config


def _with_masks(model: PeftModel, masks: Masks) -> PeftModel:
    for name, layer in masked_layers(model).items():
        if masks[name].shape != layer.get_base_layer().weight.shape:
            raise UserError(
                f"{name} has shape {tuple(layer.get_base_layer().weight.shape)}, its mask {tuple(masks[name].shape)}: "
                "another model's mask file?"
            )
        layer.set_mask(masks[name])
    return model


def _targets(masks: Masks, wanted: list[str]) -> list[str]:
    # fused experts are no modules that peft could adapt: they stay as they were pruned
    matrices = [name.removesuffix(".weight") for name in masks if name.endswith(".weight")]
    if wanted == ["all"]:
        return matrices
    chosen = [name for name in matrices if name.rpartition(".")[2] in wanted]
    endings = sorted({name.rpartition(".")[2] for name in matrices})
    for target in wanted:
        if target not in endings:
            raise UserError(
                f"finetune.targets: no pruned matrix is called '{target}'; there are {', '.join(endings)}, or all"
            )
    return chosen
