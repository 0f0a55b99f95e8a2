"""Attaches the masked LoRA to a model: which matrices, in which form."""

import re
from collections.abc import Iterable

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline import tasks
from pipeline.engine.blocks import find_blocks
from pipeline.recovery.masked_linear import ADAPTER, MaskedLinear
from pipeline.recovery.masked_parameter import MaskedParameter, Scope
from pipeline.runtime import memory, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune
from pipeline.sparsity.masks import Masks

ALL = ["all"]  # value of finetune.targets
SAMPLE = 256  # values of a matrix, by which an adapter recognises its model
Masked = MaskedLinear | MaskedParameter


def masked_layers(model: nn.Module) -> dict[str, Masked]:
    """The masked layers by the name of the parameter each adapts, such as model.layers.0.mlp.up_proj.weight."""
    found: dict[str, Masked] = {}
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear):
            found[f"{name}.weight"] = module
        elif isinstance(module, MaskedParameter):
            found[name_in_files(name)] = module
    return found


def name_in_files(name: str) -> str:
    """Undoes the renaming in an adapted model: X.base_layer for a wrapped layer X, and X.parametrizations.weight.0 for a
    parametrised X.weight."""
    return re.sub(r"\.parametrizations\.(\w+)\.(0|original)\b", r".\1", name.replace(".base_layer.", "."))


def refresh_all(model: nn.Module) -> int:
    """Refreshes the cached weights; returns how many pruned weights were nonzero in the last forward."""
    layers = masked_layers(model).values()
    for layer in layers:
        if isinstance(layer, MaskedLinear) and layer.cached:
            layer.refresh()
    return int(sum(layer.nonzero_pruned for layer in layers))  # one synchronisation with the device, not one per layer


def attach(model: nn.Module, masks: Masks, settings: Finetune, cached: bool | None = None) -> nn.Module:
    """Adds a masked LoRA to exactly the chosen matrices of `model`, in place, and returns it; only A, B and the biases that
    `settings` names train.

    `cached`: see `MaskedLinear`; None decides by `settings`, device and free memory.
    """
    cached = _should_cache(model, settings) if cached is None else cached
    config = lora_config(model, masks, settings)
    model.base_sample = base_sample(model, masks, config)
    return adapt(model, masks, config, cached, not settings.checkpoint_activations)


@torch.no_grad()
def base_sample(model: nn.Module, masks: Masks, config: LoraConfig) -> dict[str, Tensor]:
    """Up to `SAMPLE` values of each parameter to adapt, evenly spaced, for `adapter_files`. Quantised parameters are left out:
    their values are not those of the model's files."""
    names = {parameter_of(name) for name in masks if target_of(name) in config.target_modules}
    sample = {}
    for name, parameter in model.named_parameters():
        if name in names and parameter.is_floating_point():
            flat = parameter.reshape(-1)
            sample[name] = flat[:: -(-len(flat) // SAMPLE)].cpu().clone()
    return sample


def lora_config(model: nn.Module, matrices: Iterable[str], settings: Finetune) -> LoraConfig:
    """peft's configuration for those of the pruned matrices that `settings` chooses."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias=settings.bias,
        target_modules=targets(matrices, settings.targets),
        task_type=tasks.of(model.config).peft_type,
    )


def _should_cache(model: nn.Module, settings: Finetune) -> bool:
    if settings.effective != "auto":
        return settings.effective == "cached"
    if settings.quantize or settings.strategy == "fsdp" or settings.dropout:
        return False
    if processes.device().type == "cpu":
        return False  # recomputing costs 1% of a step of 2048 tokens on a CPU (benchmarks/RESULTS.md)
    more = sum(p.numel() * p.element_size() for p in model.parameters()) / memory.GIB
    return more < memory.free_gib(processes.device()) / 2  # leave the other half for activations


def adapt(model: nn.Module, masks: Masks, config: LoraConfig, cached: bool, recompute: bool) -> nn.Module:
    """Attaches the masked LoRA of `config`, in place. peft's `get_peft_model` is not used: it matches name suffixes, redirects
    some targets to fused experts and refuses others, and so would silently skip some of the chosen matrices."""
    model.requires_grad_(False)
    mask_names: dict[str, list[str]] = {}  # the masks of each parameter: one, or one per expert
    for name in masks:
        if target_of(name) in config.target_modules:
            mask_names.setdefault(parameter_of(name), []).append(name)
    modules = list(model.modules())
    called = {module for module in modules if _is_called(module)}  # before the scope adds its hooks
    # inside checkpointed layers, so that it runs again with the layer
    scope = Scope((part for block in find_blocks(model) for part in block.module.children()), recompute)
    wrapped: dict[nn.Module, MaskedLinear] = {}
    biases: list[nn.Parameter] = []
    for name, holders in _holders(model, mask_names).items():
        module, attribute = holders[0]
        parameter, transposed = module.get_parameter(attribute), masks.packed[mask_names[name][0]].transposed
        layer: Masked
        if len(holders) == 1 and module in called:
            layer = MaskedLinear(module, ADAPTER, config, r=config.r, lora_alpha=config.lora_alpha)
            _check_shapes(name, mask_names[name], masks, layer.weight_shape)
            layer.set_mask(masks[name], cached)
            wrapped[module] = layer
        else:
            _check_shapes(name, mask_names[name], masks, parameter.shape)
            mask = masks.for_parameter(name, parameter)
            layer = MaskedParameter(module, attribute, config.r, config.lora_alpha / config.r, transposed)
            layer.set_mask(
                mask, [e for e in range(len(parameter)) if mask_names[name] != [name] and f"{name}[{e}]" not in masks]
            )
            for other, other_attribute in holders[1:]:
                layer.attach(other, other_attribute)
        layer.scope = scope
        bias = getattr(module, "bias" if attribute == "weight" else f"{attribute}_bias", None)
        biases += [] if bias is None else [bias]
    for module in modules:
        for name, child in list(module.named_children()):
            if child in wrapped:
                setattr(module, name, wrapped[child])
    found = masked_layers(model)
    assert found.keys() == mask_names.keys(), (
        f"adapted other matrices than asked: {sorted(found.keys() ^ mask_names.keys())[:3]}"
    )
    if config.bias == "all":
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    trained = [p for layer in found.values() for p in (layer.a, layer.b)] + biases * (config.bias != "none")
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()  # a 16-bit bias would lose small steps
    config.base_model_name_or_path = getattr(model, "name_or_path", None)
    model.masked_lora = config
    return model


def _holders(model: nn.Module, names: Iterable[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """The (module, attribute) pairs that hold each parameter; several if blocks share weights."""
    found: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names}
    by_id = {id(parameter): name for name, parameter in model.named_parameters() if name in found}
    if missing := found.keys() - by_id.values():
        raise UserError(
            f"the model has no {sorted(missing)[0]} ({len(missing)} masked matrices missing): is this another model's mask "
            "file?"
        )
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in by_id:
                found[by_id[id(parameter)]].append((module, attribute))
    return found


def _is_called(module: nn.Module) -> bool:
    """Whether the module computes just x W^T + b: in some models a Linear has its own forward, and users add hooks, which are
    not called where another module takes its place."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    if not module.weight.is_floating_point():
        return True
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    changed = "forward" in vars(module) or any(getattr(module, hooks) for hooks in kinds)
    return type(module).forward in (nn.Linear.forward, Conv1D.forward) and not changed


def _check_shapes(name: str, masked: list[str], masks: Masks, shape: tuple[int, ...]) -> None:
    for mask in masked:
        expected = tuple(shape if mask == name else shape[1:])
        if masks.packed[mask].shape != expected or (mask != name and int(mask[len(name) + 1 : -1]) >= shape[0]):
            raise UserError(
                f"{mask} has shape {expected}, its mask {masks.packed[mask].shape}: is this another model's mask file?"
            )


def parameter_of(mask: str) -> str:
    """The parameter that a mask belongs to: `experts.down_proj` for `experts.down_proj[3]`."""
    return mask.partition("[")[0]


def target_of(mask: str) -> str:
    """The name of a masked matrix in `finetune.targets`: its module, or its parameter if that is no `weight`."""
    return parameter_of(mask).removesuffix(".weight")


def targets(pruned: Iterable[str], wanted: list[str]) -> list[str]:
    """The matrices to adapt (see `target_of`) among the names of pruned weights, fused experts once. Raises `UserError` if a
    target matches nothing."""
    if not wanted:
        raise UserError("finetune.targets is empty: set finetune.targets=[all], or last parts of matrix names")
    matrices = list(dict.fromkeys(target_of(name) for name in pruned))
    if wanted == ALL:
        return matrices
    chosen = [name for name in matrices if name.rpartition(".")[2] in wanted]
    endings = sorted({name.rpartition(".")[2] for name in matrices})
    for target in wanted:
        if target not in endings:
            raise UserError(
                f"finetune.targets: no pruned matrix is called '{target}': set some of {', '.join(endings)}, or all"
            )
    return chosen
