"""Finds a model's layers ("blocks") as an ordered list, by structure, not by model name."""

import re
from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.models.architecture import classifies_images
from pipeline.models.pointwise import PointwiseConv, is_pointwise
from pipeline.runtime.errors import UserError

OTHER_INPUT = re.compile("Audio|Image|Speech|Video|Vision")  # in a class name


class Block:
    """A layer: `index` is its position in the model, `name` its path, such as "model.layers.3"."""

    __slots__ = ("index", "module", "name")

    def __init__(self, index: int, name: str, module: nn.Module) -> None:
        self.index, self.name, self.module = index, name, module

    def tensors(self) -> Iterator[Tensor]:
        yield from self.module.parameters()
        yield from self.module.buffers()


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of the language model in `model`, in module order.

    They are the items of the outermost module lists that hold matrices. Vision towers and other non-text submodels are
    skipped. A list of plain matrices, such as Gemma 3n's projections next to its layers, does not count.

    In an image model they are the items of the innermost lists, since its stages hold the lists of its layers. Its lists may be
    nn.Sequential, as in timm.

    Raises `UserError` if there are no blocks, or if layers of a language model hold lists of layers.
    """
    lists: dict[str, nn.ModuleList | nn.Sequential] = {}
    staged = _classifies_images(model)
    kind = nn.ModuleList | nn.Sequential if staged else nn.ModuleList
    for name, module in language_model(model):
        outer = [other for other in lists if name.startswith(f"{other}.")]
        if isinstance(module, kind) and any(map(_has_matrices, module)) and (staged or not outer):
            for stage in outer:
                del lists[stage]
            lists[name] = module
    # the lists by path without numbers: several of one kind are inside of layers
    kinds = Counter(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in lists)
    found: dict[nn.Module, str] = {}
    for outer, modules in lists.items():
        for name, module in _items(outer, modules):
            found.setdefault(module, name)  # the same module listed twice is one block
    if not found or (max(kinds.values()) > 1 and not staged):
        what = f"lists inside of layers ({next(iter(lists))} and others)" if found else "no list of layers"
        if not found and any(map(is_pointwise, model.modules())):
            what += " but with 1x1 convolutions: set prune.pointwise=true"
        raise UserError(
            f"{type(model).__name__} is not supported: expected module lists of layers with Linear or Conv1D matrices, "
            f"found {what}"
        )
    return [Block(index, name, module) for index, (module, name) in enumerate(found.items())]


def _items(name: str, modules: nn.ModuleList | nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a list, nested lists flattened."""
    for i, item in enumerate(modules):
        if isinstance(item, nn.ModuleList):
            yield from _items(f"{name}.{i}", item)
        else:
            yield f"{name}.{i}", item


def _classifies_images(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return isinstance(config, PreTrainedConfig) and classifies_images(config)


def language_model(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by name, without those of submodels that do not read text. All modules of an image model."""
    if _classifies_images(model):
        yield from model.named_modules()
        return
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        decoder = model  # some models return their head
    inside = set(decoder.modules())
    others: list[str] = []
    for name, module in model.named_modules():
        is_other_model = isinstance(module, PreTrainedModel) and decoder not in set(module.modules())
        if is_other_model and (module.main_input_name != "input_ids" or OTHER_INPUT.search(type(module).__name__)):
            others.append(f"{name}.")
        if module in inside and not f"{name}.".startswith(tuple(others)):
            yield name, module


def shared_parameters(blocks: list[Block]) -> set[int]:
    """The ids of parameters that several blocks hold, such as the shared transformer block of Zamba2."""
    times = Counter(id(parameter) for block in blocks for parameter in block.module.parameters())
    return {key for key, count in times.items() if count > 1}


def tensors_outside(model: nn.Module, blocks: list[Block]) -> list[Tensor]:
    """The parameters and buffers outside the blocks: embeddings, norms, head."""
    inside = {id(module) for block in blocks for module in block.module.modules()}
    modules = [module for module in model.modules() if id(module) not in inside]
    return [t for m in modules for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]]


def is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a two-dimensional `weight`."""
    return isinstance(module, nn.Linear | Conv1D | PointwiseConv)


def _has_matrices(module: nn.Module) -> bool:
    return not is_matrix(module) and any(map(is_matrix, module.modules()))
