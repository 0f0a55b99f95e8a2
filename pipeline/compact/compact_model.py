"""`load_compact(folder)`: owns a model of transformers whose pruned matrices hold only their compact form, on the CPU."""

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
from pipeline.models import file_names
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe

SMALL = 1 << 16  # weights below which a dense matrix is left to torch


class Compacted:
    """What a module with compact weights is besides: they are no parameters, and stay where and what they are."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for weight in self._compact.values():
            probe = fn(torch.empty(0, dtype=weight.dtype))
            if probe.dtype != weight.dtype or probe.device.type != "cpu":
                raise UserError(
                    "a compact model stays on the CPU and in its dtype: `launch.py expand` makes a dense one"
                )
        return super()._apply(fn, recurse)


class CompactLinear(Compacted, nn.Linear):
    """x W^T + b, with W in compact form."""

    @property
    def weight(self) -> CompactWeight:
        return self._compact["weight"]

    def forward(self, x: Tensor) -> Tensor:
        return self._compact["weight"].linear(x, self.bias)


class CompactConv1D(Compacted, Conv1D):
    """The same, of GPT-2's Conv1D, whose weight is stored (in, out)."""

    weight = CompactLinear.weight
    forward = CompactLinear.forward


class FewTokensLinear(nn.Linear):
    """A dense Linear in bfloat16, as an LM head is: torch's product for one token is far from the speed of the memory."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        few = (
            x.numel() <= FEW * weight.shape[1] and x.dtype == weight.dtype == torch.bfloat16 and weight.is_contiguous()
        )
        plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if not (few and plain and x.device.type == weight.device.type == "cpu") or kernels.load() is None:
            return super().forward(x)
        flat = x.reshape(-1, weight.shape[1]).contiguous()
        return kernels.load().dense.default(weight, flat, bias).view(*x.shape[:-1], len(weight))


def load_compact(folder: str | Path, recipe: Recipe | None = None) -> nn.Module:
    """The model of a compact folder, in evaluation mode, for `generate` or any other use without training.

    Values are a lazy view of the files. Checks sizes and headers, and of each matrix that its mask has a bit for each value;
    `expand` checks the hashes too. Raises `UserError` where the folder is no compact model, or is damaged.
    """
    recipe = recipe or Recipe()
    found = CompactFolder(Path(folder).expanduser())
    model = empty_model.skeleton(found, recipe)
    aliases = {name: [name] for name in found.shapes}
    for other, kept in file_names.tied_names(model).items():
        if other not in found.shapes:
            aliases[kept].append(other)
    empty_model.compute_buffers(model, set(found.shapes))
    for shard in found.shards:
        for name, it in found.read(shard):
            dtype = empty_model.dtype_in_memory(model, name, found.dtype)
            if isinstance(it, Compact):
                _attach(model, aliases[name], CompactWeight.from_compact(it, dtype))
            else:
                empty_model.place(model, aliases[name], it.to(dtype))
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.weight.numel() >= SMALL:
            module.__class__ = FewTokensLinear
    if model.can_generate() and (found.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(found.folder)
    model.save_pretrained = functools.partial(_refuse_to_save, found.folder)
    return model.eval()


def _attach(model: nn.Module, names: list[str], weight: CompactWeight) -> None:
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute in module.__dict__.get("_compact", ()):
            continue  # a module that the model has twice
        del module._parameters[attribute]
        module.__dict__.setdefault("_compact", {})[attribute] = weight
        module.__class__ = _class_with(type(module), attribute)
        if weight.experts and hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # expert by expert, as the others see them all dense


@functools.cache
def _class_with(base: type, attribute: str) -> type:
    """The class of a module of type `base` with a compact weight `attribute`."""
    if attribute == "weight" and base in (nn.Linear, Conv1D):
        return CompactLinear if base is nn.Linear else CompactConv1D
    bases = (base,) if issubclass(base, Compacted) else (Compacted, base)
    return type(base.__name__, bases, {attribute: property(lambda module: module._compact[attribute])})


def _refuse_to_save(folder: Path, *args: Any, **kwargs: Any) -> None:
    raise UserError(f"a compact model is not saved: copy {folder}, or make a dense one of it by `launch.py expand`")
