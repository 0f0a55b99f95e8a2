"""Owns the masked LoRA on a model: which matrices get one, in which form, and the folder it is kept in."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline import files, memory, processes
from pipeline.errors import UserError
from pipeline.masked_linear import ADAPTER, MaskedLinear
from pipeline.masks import Masks
from pipeline.recipe import Finetune

ALL = ["all"]  # as finetune.targets
# peft knows no adapter of this type, so that its own loader refuses a folder which it would load as a dense LoRA
MASKED_TYPE = "MASKED_LORA"


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """The masked layers by the name of the parameter that each adapts, such as model.layers.0.mlp.up_proj.weight."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}
    return {f"{name_in_files(name)}.weight": module for name, module in found.items()}


def name_in_files(name: str) -> str:
    """What peft calls base_model.model.X, or X.base_layer where it has put a layer of its own around X."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def refresh_all(model: nn.Module) -> int:
    """Renews the cached weights; the number of pruned weights that were not zero in what forward uses."""
    layers = masked_layers(model).values()
    for layer in layers:
        if layer.cached:
            layer.refresh()
    return int(sum(layer.strays for layer in layers))  # one wait for the device, not one a layer


def attach(model: nn.Module, masks: Masks, settings: Finetune, cached: bool | None = None) -> PeftModel:
    """`model` with a masked LoRA on the chosen matrices; only A and B train, and the biases that `settings` names.

    `cached`: see `MaskedLinear`; None chooses by `settings`, device and free memory.
    """
    config = lora_config(masks, settings)
    adapted = get_peft_model(model, _custom(config), adapter_name=ADAPTER)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # peft does so for A and B alone; a bias of 16 bits would lose small steps
            parameter.data = parameter.data.float()
    return _with_masks(adapted, masks, _keeps_weights(model, settings) if cached is None else cached)


def lora_config(masks: Masks, settings: Finetune) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias=settings.bias,
        target_modules=targets(masks, settings.targets),
        task_type="CAUSAL_LM",
    )


def _keeps_weights(model: nn.Module, settings: Finetune) -> bool:
    if settings.effective != "auto":
        return settings.effective == "cached"
    if settings.quantize or settings.strategy == "fsdp" or settings.dropout:
        return False
    if processes.device().type == "cpu":
        return False  # making them anew costs 1% of a step of 2048 tokens there (benchmarks/RESULTS.md)
    more = sum(p.numel() * (p.element_size() + 1) for p in model.parameters()) / memory.GIB
    return more < memory.free_gib(processes.device()) / 2  # the other half is for activations


def save_adapter(model: PeftModel, masks_file: Path, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """The adapter (`state`, else the model's own) and its masks, in a folder that only `load_adapter` opens."""
    model.save_pretrained(folder, state_dict=state)
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


def _with_masks(model: PeftModel, masks: Masks, cached: bool = True) -> PeftModel:
    for name, layer in masked_layers(model).items():
        shape = (layer.in_features, layer.out_features)[:: 1 if layer.fan_in_fan_out else -1]  # not of packed weights
        if masks[name].shape != shape:
            raise UserError(
                f"{name} has shape {shape}, its mask {tuple(masks[name].shape)}: another model's mask file?"
            )
        layer.set_mask(masks[name], cached)
    return model


def targets(pruned: Iterable[str], wanted: list[str]) -> list[str]:
    """Of the names of pruned weights, the modules that a LoRA is to adapt; `UserError` where nothing is called so."""
    # fused experts are no modules that peft could adapt: they stay as they were pruned
    matrices = [name.removesuffix(".weight") for name in pruned if name.endswith(".weight")]
    if not wanted:
        raise UserError("finetune.targets is empty: type finetune.targets=[all], or the last parts of names")
    if wanted == ALL:
        return matrices
    chosen = [name for name in matrices if name.rpartition(".")[2] in wanted]
    endings = sorted({name.rpartition(".")[2] for name in matrices})
    for target in wanted:
        if target not in endings:
            raise UserError(
                f"finetune.targets: no pruned matrix is called '{target}'; there are {', '.join(endings)}, or all"
            )
    return chosen
