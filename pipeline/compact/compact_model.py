"""`load_compact(folder)`: a transformers model whose pruned matrices stay in compact form, on the CPU or a GPU."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from pipeline.compact import empty_model, kernels
from pipeline.compact.compact_weight import FEW, CompactWeight
from pipeline.compact.compiled import compile_decoding
from pipeline.compact.file_format import Compact, CompactFolder
from pipeline.compact.forms import AUTO, BITMASK, Forms
from pipeline.compact.gpu_weight import HALVES
from pipeline.compact.memory import HugePages
from pipeline.models import file_names, loading
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe

SMALL = 1 << 16  # weights; torch handles smaller dense matrices


class CompactModule:
    """Mixin of modules with compact weights. These are no parameters, but a state dict holds them, as dense weights."""

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """For pickle and deepcopy: a class of `_class_with` has no name to be found by."""
        return _empty_module, (self._dense_class, tuple(self._compact)), self.__getstate__()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + attribute: weight.dense() for attribute, weight in self._compact.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for attribute, weight in self._compact.items():
            if prefix + attribute in state_dict:
                weight.refuse_change()
        super()._load_from_state_dict(state_dict, prefix, *args)


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
    """A dense 16-bit Linear, such as an LM head, with a kernel of ours for few tokens: torch's is far below memory speed."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        few = x.numel() <= FEW * weight.shape[1] and x.dtype == weight.dtype and weight.is_contiguous()
        plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if not (few and plain and x.is_cpu and weight.is_cpu) or kernels.load() is None:
            return super().forward(x)
        return kernels.load().dense.default(weight, x, self.bias)


def load_compact(
    folder: str | Path,
    recipe: Recipe | None = None,
    device: str | torch.device = "cpu",
    form: str = AUTO,
    tokens: int = 1,
    compiled: bool = False,
) -> nn.Module:
    """Loads a compact folder in evaluation mode, for `generate` or any other inference.

    On a GPU (`device="cuda"`), `form` says how pruned matrices are held: `bitmask`; `semi-structured`, for those that are 2:4
    in 16 bits; `dense`; or `auto`, the fastest of these here for `tokens` tokens at a time, the batch size of decoding.
    The choices and times are in `model.compact_forms`, see `Forms.table`.

    On the CPU, `compiled` sets up `generate` to compile its decoding steps, see `compile_decoding`.

    Checks sizes, headers, the hashes of small files, and that each mask has as many bits as values; `expand` also checks the
    hashes of the tensors' files.
    Raises `UserError` if the folder is not a compact model, or is damaged, or if there is no such device.
    """
    device = _checked(device)
    forms = Forms(device, form, tokens)
    if device.type == "cpu" and form not in (AUTO, BITMASK):
        raise UserError(f'form={form} needs a GPU: pass device="cuda" to load_compact')
    if compiled and device.type != "cpu":
        raise UserError("compiled=True is for the CPU: torch.compile cannot trace compact products on a GPU")
    model = _load(folder, recipe or Recipe(), device, forms if device.type == "cuda" else None)
    return compile_decoding(model) if compiled else model


def _checked(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device={device} is unknown: set device=cpu or device=cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"device={device}: a compact model runs on cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}: there are {torch.cuda.device_count()} GPUs here; set device=cpu")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def _load(folder: str | Path, recipe: Recipe, device: torch.device, forms: Forms | None) -> nn.Module:
    """`forms`: of pruned matrices on a GPU; None for the CPU's form."""
    found = CompactFolder(Path(folder).expanduser())
    model = empty_model.skeleton(found, recipe)
    aliases = {name: [name] for name in found.shapes}
    for other, kept in file_names.tied_names(model).items():
        if other not in found.shapes:
            aliases[kept].append(other)
    empty_model.compute_buffers(model, set(found.shapes))
    loading.set_own_buffers(model, found.folder, recipe)
    # on the CPU a copy of every tensor: one view of a file would keep all that was read of it in memory
    memory = HugePages().copy if forms is None else (lambda tensor: tensor)
    for shard in found.shards:
        for name, value in found.read(shard):
            dtype = empty_model.dtype_in_memory(model, name, found.dtype)
            if isinstance(value, Compact) and len(value.layout.shape) == 4:
                weight = memory(value.dense().to(device, dtype))  # no kernel convolves
            elif isinstance(value, Compact):
                weight = CompactWeight.from_compact(value, dtype, memory)
                weight = weight if forms is None else forms.place(weight)
            else:
                weight = memory(value.to(device, dtype))
            if isinstance(weight, CompactWeight):
                _attach(model, aliases[name], weight)
            else:
                empty_model.place(model, aliases[name], weight)
    if forms is None:
        for module in model.modules():
            if type(module) is nn.Linear and module.weight.dtype in HALVES and module.weight.numel() >= SMALL:
                module.__class__ = FewTokensLinear
    if model.can_generate() and (found.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(found.folder)
    if forms is not None:
        model.to(device)  # buffers that no file holds
        model.compact_forms = forms.table
        if model.can_generate():
            model.generation_config.disable_compile = True  # of static caches: compact products cannot be traced
    model.save_pretrained = functools.partial(_refuse_to_save, found.folder)
    for module in model.modules():
        if any(isinstance(inner, CompactModule) for inner in module.modules()):
            module._apply = functools.partial(_apply, module)
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


def _empty_module(base: type, attributes: tuple[str, ...]) -> nn.Module:
    for attribute in attributes:
        base = _class_with(base, attribute)
    return base.__new__(base)


def _apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`module._apply`, for a module that holds compact weights, which cannot change device or dtype: refuses before any of its
    parameters has changed."""
    for part in module.modules():
        for weight in part.__dict__.get("_compact", {}).values():
            probe = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
            if probe.dtype != weight.dtype or probe.device != weight.device:
                raise UserError(
                    "a compact model cannot change device or dtype: pass device= to load_compact, or make it dense with "
                    "`python launch.py expand`"
                )
    return type(module)._apply(module, fn, recurse)


def _refuse_to_save(folder: Path, *args: Any, **kwargs: Any) -> None:
    raise UserError(f"a compact model cannot be saved: copy {folder}, or make it dense with `python launch.py expand`")
