"""Builds a model without weights and sets them one by one, by name in memory.

transformers does this inside from_pretrained, which only reads whole files. This module holds the transformers internals we
need: the names a model may lack, the dtype of a weight in memory, and how to compute buffers that no file holds.
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
    raise UserError(f"this transformers version loads models differently ({error}): install the pinned one") from error


def skeleton(found: CompactFolder, recipe: Recipe) -> nn.Module:
    """The model of a compact folder, without weights. Raises `UserError` unless the folder holds exactly its weights."""
    model = loading.skeleton(found.folder, recipe, found.dtype)
    known = model.state_dict()
    for name, shape in found.shapes.items():
        if name not in known:
            raise UserError(
                f"{found.folder} holds {name}, which its config.json does not define: is it another model's?"
            )
        if shape != tuple(known[name].shape):
            raise UserError(
                f"{found.folder}: {name} is {shape} in the files, but {tuple(known[name].shape)} by config.json"
            )
    tied = file_names.tied_names(model)
    missing = {name for name in known if tied.get(name, name) not in found.shapes and name not in found.shapes}
    info = LoadStateDictInfo(missing, set(), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    if info.missing_keys:
        raise UserError(f"{found.folder} lacks {min(info.missing_keys)} ({len(info.missing_keys)} missing)")
    return model


def compute_buffers(model: nn.Module, in_files: set[str]) -> None:
    """Computes what no file holds: non-persistent buffers, and optional ones. `in_files`: names that the files hold."""
    state, tied = model.state_dict(keep_vars=True), file_names.tied_names(model)
    for tensor in state.values():
        tensor._is_hf_initialized = True  # else transformers fills it with random numbers
    missing = {name for name in state if name not in in_files and tied.get(name, name) not in in_files}
    model._move_missing_keys_from_meta_to_device(missing, None, None, None)
    model._initialize_missing_keys(False)


def dtype_in_memory(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter or buffer in a model loaded as `dtype`: some stay in float32."""
    if plan := model._get_dtype_plan(dtype):
        pattern, by_group, _ = build_glob_alternation(list(plan))
        if match := pattern.search(name):
            return plan[by_group[match.lastgroup]]
    return _tensor_at(model, name).dtype


def place(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Sets a parameter or buffer under all its names."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute in module._parameters:
            module._parameters[attribute] = parameter
        else:
            module._buffers[attribute] = tensor


def _tensor_at(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)
