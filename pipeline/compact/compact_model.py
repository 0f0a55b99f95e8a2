"""`load_compact(folder)`: a transformers model on the CPU whose pruned matrices stay in compact form."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from pipeline.compact import empty_model, kernels
from pipeline.compact.compact_weight import FEW, CompactWeight
from pipeline.compact.file_format import Compact, CompactFolder
from pipeline.compact.memory import HugePages
from pipeline.models import file_names
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe

SMALL = 1 << 16  # weights; torch handles smaller dense matrices
HALVES = (torch.bfloat16, torch.float16)


class CompactModule:
    """Mixin of modules with compact weights, which are no parameters and cannot change device or dtype."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for weight in self._compact.values():
            probe = fn(torch.empty(0, dtype=weight.dtype))
            if probe.dtype != weight.dtype or probe.device.type != "cpu":
                raise UserError(
                    "a compact model cannot change device or dtype: make it dense with `python launch.py expand`"
                )
        return super()._apply(fn, recurse)


class CompactLinear(CompactModule, nn.Linear):
    """x W^T + b with a compact W."""

    @property
    def weight(self) -> CompactWeight:
        return self._compact["weight"]

    def forward(self, x: Tensor) -> Tensor:
        return self._compact["weight"].linear(x, self.bias)


class CompactConv1D(CompactModule, Conv1D):
    """The same for GPT-2's Conv1D, whose weight is stored (in, out)."""

    weight = CompactLinear.weight
    forward = CompactLinear.forward


class FewTokensLinear(nn.Linear):
    """A dense Linear of a 16-bit dtype, such as an LM head: torch's one-token product is far below memory speed."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        few = x.numel() <= FEW * weight.shape[1] and x.dtype == weight.dtype and weight.is_contiguous()
        plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if not (few and plain and x.is_cpu and weight.is_cpu) or kernels.load() is None:
            return super().forward(x)
        return kernels.load().dense.default(weight, x, self.bias)


def load_compact(folder: str | Path, recipe: Recipe | None = None) -> nn.Module:
    """Loads a compact folder in evaluation mode, for `generate` or any other inference.

    Checks sizes, headers, and that each mask has as many bits as values; `expand` also checks the hashes.
    Raises `UserError` if the folder is not a compact model, or is damaged.
    """
    recipe = recipe or Recipe()
    found = CompactFolder(Path(folder).expanduser())
    model = empty_model.skeleton(found, recipe)
    aliases = {name: [name] for name in found.shapes}
    for other, kept in file_names.tied_names(model).items():
        if other not in found.shapes:
            aliases[kept].append(other)
    empty_model.compute_buffers(model, set(found.shapes))
    copy = HugePages().copy  # of every tensor: one view of a file would keep all that was read of it in memory
    for shard in found.shards:
        for name, it in found.read(shard):
            dtype = empty_model.dtype_in_memory(model, name, found.dtype)
            if isinstance(it, Compact):
                _attach(model, aliases[name], CompactWeight.from_compact(it, dtype, copy))
            else:
                empty_model.place(model, aliases[name], copy(it.to(dtype)))
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in HALVES and module.weight.numel() >= SMALL:
            module.__class__ = FewTokensLinear
    if model.can_generate() and (found.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(found.folder)
    model.save_pretrained = functools.partial(_refuse_to_save, found.folder)
    return model.eval()


def make_dense(model: nn.Module) -> nn.Module:
    """Replaces all compact weights of a loaded model by dense parameters of the same values, in place."""
    for module in model.modules():
        for attribute, weight in module.__dict__.pop("_compact", {}).items():
            module.__class__ = module.__dict__.get("_dense_class", module.__class__)
            module.register_parameter(attribute, nn.Parameter(weight.dense(), requires_grad=False))
    return model


def _attach(model: nn.Module, names: list[str], weight: CompactWeight) -> None:
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute in module.__dict__.get("_compact", ()):
            continue  # a module that the model holds twice
        del module._parameters[attribute]
        module.__dict__.setdefault("_dense_class", type(module))
        module.__dict__.setdefault("_compact", {})[attribute] = weight
        module.__class__ = _class_with(type(module), attribute)
        if weight.experts and hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # one expert at a time; the others would expand them all


@functools.cache
def _class_with(base: type, attribute: str) -> type:
    """The class for a module of type `base` with a compact weight `attribute`."""
    if attribute == "weight" and base in (nn.Linear, Conv1D):
        return CompactLinear if base is nn.Linear else CompactConv1D
    bases = (base,) if issubclass(base, CompactModule) else (CompactModule, base)
    return type(base.__name__, bases, {attribute: property(lambda module: module._compact[attribute])})


def _refuse_to_save(folder: Path, *args: Any, **kwargs: Any) -> None:
    raise UserError(f"a compact model cannot be saved: copy {folder}, or make it dense with `python launch.py expand`")
