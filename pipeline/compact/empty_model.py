"""Owns a model that is built without weights and given them one by one, under their names in memory.

transformers does this inside from_pretrained, which knows only whole files. What of its internals is used for it is here:
which names a model may lack, which dtype a weight has in memory, and how the buffers that no file holds are computed.
"""

import torch
from torch import Tensor, nn

from pipeline.compact.file_format import CompactFolder
from pipeline.models import file_names, loading
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe

try:
    from transformers.core_model_loading import build_glob_alternation
    from transformers.utils.loading_report import LoadStateDictInfo
except ImportError as error:
    raise UserError(f"this version of transformers loads otherwise ({error}): install the pinned one") from error


def skeleton(found: CompactFolder, recipe: Recipe) -> nn.Module:
    """The model of a compact folder without its weights. `UserError` where what the folder holds is not exactly its weights."""
    model = loading.skeleton(found.folder, recipe, found.dtype)
    known = model.state_dict()
    for name, shape in found.shapes.items():
        if name not in known:
            raise UserError(f"{found.folder} holds {name}, which its config.json has no place for: another model's?")
        if shape != tuple(known[name].shape):
            raise UserError(
                f"{found.folder}: {name} is {shape} in the files, {tuple(known[name].shape)} by config.json"
            )
    tied = file_names.tied_names(model)
    missing = {name for name in known if tied.get(name, name) not in found.shapes and name not in found.shapes}
    info = LoadStateDictInfo(missing, set(), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    if info.missing_keys:
        raise UserError(f"{found.folder} lacks {min(info.missing_keys)} ({len(info.missing_keys)} missing in all)")
    return model


def compute_buffers(model: nn.Module, given: set[str]) -> None:
    """Computes what no file holds: buffers that are not persistent, and what a model may lack. `given`: what a file holds."""
    state, tied = model.state_dict(keep_vars=True), file_names.tied_names(model)
    for tensor in state.values():
        tensor._is_hf_initialized = True  # else it would be filled with random numbers
    lacking = {name for name in state if name not in given and tied.get(name, name) not in given}
    model._move_missing_keys_from_meta_to_device(lacking, None, None, None)
    model._initialize_missing_keys(False)


def dtype_in_memory(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """That of a parameter or buffer of a model loaded in `dtype`: some stay in float32."""
    if plan := model._get_dtype_plan(dtype):
        pattern, by_group, _ = build_glob_alternation(list(plan))
        if match := pattern.search(name):
            return plan[by_group[match.lastgroup]]
    return _owner(model, name).dtype


def place(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Gives a parameter or buffer its tensor, under all the names that it has."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute in module._parameters:
            module._parameters[attribute] = parameter
        else:
            module._buffers[attribute] = tensor


def _owner(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)
