"""Maps the names and shapes of parameters in memory to those of the tensors in a model's files, and back.

transformers 5 converts while loading: it renames tensors, fuses `experts.0.up_proj.weight` and so on into one parameter, and
splits fused projections. Our files keep the input's names and shapes, the only ones other tools know. Only this file
uses the transformers internals for it.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline.runtime.errors import UserError

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        WeightTransform,
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.utils.loading_report import LoadStateDictInfo
except ImportError as error:
    raise UserError(
        f"this transformers version converts names differently ({error}): install the pinned one"
    ) from error

State = dict[str, Tensor]


def to_files(model: nn.Module, state: State) -> State:
    """Renames tensors from their names in memory to the names and shapes in the files that `model` was loaded from (or of
    its family, if it was not loaded). `state` may be any part of the model that holds whole decoder layers."""
    return revert_weight_conversion(model, state)


def converts(model: nn.Module) -> bool:
    """Whether `to_files` changes any name or shape."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(conversion, WeightConverter) for conversion in conversions):
        return True  # it may keep the name and change the shape
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    return to_files(model, state).keys() != state.keys()


def set_file_names(model: nn.Module, in_files: Iterable[str]) -> None:
    """Makes `to_files` give the names of files that hold `in_files`, as if `model` had been loaded from unquantised ones."""
    conversions = get_model_conversion_mapping(model)
    for _ in _renamed(model, conversions, in_files):
        pass  # each conversion records that it was used
    model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]


def saved_state(model: nn.Module) -> State:
    """What a checkpoint of the model holds, by name in memory: no non-persistent buffer, each tied weight once."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    tied = tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied and name not in ignored}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Redundant names of tied parameters -> the name to keep: the one that transformers expects, else the first."""
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    found = {}
    for same in names.values():
        kept = next((name for name in same if name not in declared), same[0])
        found |= {name: kept for name in same if name != kept}
    return found


def layer_of(name: str) -> str:
    """The layer part of a parameter's name (up to its first number), "" outside the layers."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else ""


class FileNames:
    """Maps the tensors in a model's files to its parameters and buffers, layer by layer.

    `model` needs no weights; `shapes` are the tensors' shapes by name in the files. As after a load by transformers,
    `missing`, `unexpected` (names) and `mismatched` (name, shape in the files, shape in the model) hold what does not fit.
    """

    def __init__(self, model: nn.Module, shapes: dict[str, Sequence[int]]) -> None:
        self.model, self.conversions = model, get_model_conversion_mapping(model)
        known = model.state_dict()
        self.ties = tied_names(model)
        self.sources: dict[str, list[tuple[str, str | None]]] = {}  # by the first name that they produce; see _renamed
        unexpected = set()
        for name, renamed, pattern in _renamed(model, self.conversions, shapes):
            if renamed in known:
                self.sources.setdefault(renamed, []).append((name, pattern))
            else:
                unexpected.add(renamed)
        made: State = {}
        self.made_by: dict[str, str] = {}  # a name in memory -> the key of `sources`
        for first in self.sources:
            found = self._converted(first, lambda name: torch.empty(tuple(shapes[name]), device="meta"))
            made |= found
            self.made_by |= dict.fromkeys(found, first)
        info = LoadStateDictInfo(
            known.keys() - made.keys(), unexpected | made.keys() - known.keys(), set(), [], {}, set()
        )
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
        self.missing, self.unexpected = info.missing_keys, info.unexpected_keys
        sizes = {
            name: (tuple(tensor.shape), tuple(known[name].shape)) for name, tensor in made.items() if name in known
        }
        self.mismatched = {(name, *size) for name, size in sizes.items() if size[0] != size[1]}
        self.layers: dict[str, list[str]] = {}  # the keys of `sources` by layer
        for first in sorted(self.sources, key={name: place for place, name in enumerate(known)}.__getitem__):
            self.layers.setdefault(layer_of(first), []).append(first)

    def read(self, layer: str, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields name in memory and tensor of each parameter and buffer of a layer, one conversion at a time. `read` returns
        a tensor of the files; dtypes are kept. Tied tensors come once, unless they differ and so are not really tied."""
        for first in self.layers[layer]:
            for name, tensor in self._converted(first, read).items():
                kept = self.ties.get(name, name)
                if kept != name and kept in self.made_by:
                    if torch.equal(tensor, self._converted(self.made_by[kept], read)[kept]):
                        continue
                    kept = name
                yield kept, tensor

    def _converted(self, first: str, read: Callable[[str], Tensor]) -> State:
        converters = {k: c for c in self.conversions if isinstance(c, WeightConverter) for k in c.source_patterns}
        name, pattern = self.sources[first][0]
        transform = copy.deepcopy(converters[pattern]) if pattern else WeightRenaming(name, first)
        for name, pattern in self.sources[first]:
            transform.add_tensor(first, name, pattern or name, functools.partial(read, name))
        found = transform.convert(first, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}


def _renamed(
    model: nn.Module, conversions: list[WeightTransform], in_files: Iterable[str]
) -> Iterator[tuple[str, str, str | None]]:
    """Yields the name in the files, the (first) name in memory made from it, and the pattern of the converter that makes it,
    if any: in the order and by the rules of transformers' `convert_and_load_state_dict_in_model`."""
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    prefix, known = model.base_model_prefix, model.state_dict()
    for name in sorted(in_files, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        yield name, renamed, pattern
