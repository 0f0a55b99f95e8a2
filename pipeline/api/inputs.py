"""The arguments of the API: checks them and converts them for the engine.

Shapes: N = windows, T = tokens of a window.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.compact.compact_model import CompactModule
from pipeline.data import sources, special_tokens
from pipeline.data.sources import Source
from pipeline.models import loading, processors
from pipeline.recovery.masked_parameter import MaskedParameter
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks

Texts = str | Path | list[str] | tuple[str, ...] | Dataset | Tensor

SECTIONS = {f.name: f.type for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(f.type)}
KEYS = {f.name for section in SECTIONS.values() for f in dataclasses.fields(section)}
IN_RECIPES = re.compile(rf"\b({'|'.join(SECTIONS)})\.(\w+)")
PLAIN = (str, int, float, bool, type(None))


def api_function(function: Callable) -> Callable:
    """Refuses several processes, and turns the recipe keys in the function's `UserError`s into its arguments. Compiled parts of
    a model run uncompiled: hooks in compiled code observe nothing. The caller's modes and defaults of torch do not count."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if processes.world_size() > 1:
            raise UserError(
                f"espalier.{function.__name__} works in one process, and this is one of {processes.world_size()}: use "
                "`accelerate launch launch.py` for several"
            )
        try:
            with _usual_torch(), _uncompiled():
                return function(*args, **kwargs)
        except UserError as error:
            text = IN_RECIPES.sub(lambda m: m[2] if m[2] in KEYS or m[2] in kwargs else m[0], str(error))
            text = text.replace("unknown key", "unknown argument")
            if text == str(error):
                raise
            raise UserError(text) from error

    return call


@contextmanager
def _usual_torch() -> Iterator[None]:
    """torch's modes and defaults as in the command, so that results are equal: autocast would round every sum over the inputs
    to 16 bits, and in inference mode nothing can be trained. The caller's are restored."""
    dtype, matmuls = torch.get_default_dtype(), (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    precisions = [matmul.fp32_precision for matmul in matmuls]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            for matmul in matmuls:
                matmul.fp32_precision = "ieee"
            yield
        finally:
            torch.set_default_dtype(dtype)
            for matmul, precision in zip(matmuls, precisions):
                matmul.fp32_precision = precision


def _uncompiled() -> AbstractContextManager:
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled; its import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def recipe(stages: list[str], seed: int, mirror: str | None = None, **sections: dict[str, Any]) -> Recipe:
    """The recipe of an equal run, checked."""
    layer: dict[str, Any] = {"model": "in memory", "stages": stages, "seed": seed, "mirror": mirror}
    for name, settings in sections.items():
        layer[name] = {key: _plain(f"{name}.{key}", value) for key, value in settings.items()}
    return reader.checked([{key: _plain(key, value) for key, value in layer.items()}])


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(key, item) for name, item in value.items()}
    if not isinstance(value, PLAIN):
        raise UserError(f"{key} is a {type(value).__name__}: a string, a number, or a list or dict of these is needed")
    return value


def check_model(model: Any, name: str = "model", may_be_compact: bool = False) -> None:
    """Raises `UserError` unless it is a transformers model with plain weights on one device."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{name} is a {type(model).__name__}: pass a transformers model, as from_pretrained returns it (of a peft model, "
            "the result of merge_and_unload())"
        )
    if any(isinstance(module, BaseTunerLayer | MaskedParameter) for module in model.modules()):
        raise UserError(f"{name} has an adapter: merge it first, or pass the model without it")
    if not may_be_compact and any(isinstance(module, CompactModule) for module in model.modules()):
        raise UserError(f"{name} is compact: pass the model that was exported, or that `expand` writes")
    if getattr(model, "hf_quantizer", None) is not None or any(not p.is_floating_point() for p in model.parameters()):
        raise UserError(f"{name} is quantised: load it unquantised, or use the command, which dequantises it")
    if any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()]):
        raise UserError(f"{name} was made inside torch.inference_mode, so it cannot change: load it outside")
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    if torch.device("meta") in devices:
        raise UserError(f"{name} has weights on the meta device: load it without offloading")
    if len(devices) > 1:
        raise UserError(f"{name} is on several devices ({', '.join(sorted(map(str, devices)))}): load it on one")


def check_tokenizer(tokenizer: Any, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"tokenizer is a {type(tokenizer).__name__}: pass a tokenizer of AutoTokenizer.from_pretrained")
    special_tokens.check(tokenizer, model.config, tokenizer.name_or_path or "this call")
    return tokenizer


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder or hub repository that the model was loaded from."""
    try:
        return processors.read_tokenizer(model.name_or_path)
    except Exception as error:  # depends on the files there
        raise UserError(
            f"there is no tokenizer where the model was loaded from ('{model.name_or_path}'): pass tokenizer=..."
        ) from error


def check_masks(masks: Any, model: nn.Module | None = None) -> None:
    """Raises `UserError` unless these are masks, and the model's if one is passed."""
    if not isinstance(masks, Masks):
        raise UserError(f"masks is a {type(masks).__name__}: pass the result of prune or Masks.load")
    if not len(masks):
        raise UserError("masks holds no mask")
    if model is not None:
        masks.refuse_other_model(model)


def has_convolutions(masks: Masks) -> bool:
    return any(len(mask.shape) == 4 for mask in masks.packed.values())


def source(data: Texts, section: str, name: str, column: str | None, mirror: str | None, split: str) -> Source:
    """A text, other than a tensor, as a `Source`. `name`: the argument's."""
    if isinstance(data, str | Path):
        if str(data) == sources.SELF:
            raise UserError(f"{name}='self' (text generated by the model) works only in the command: pass texts")
        return sources.source(str(data), mirror, split, None, column, section)
    if isinstance(data, list | tuple):
        if not_text := [item for item in data if not isinstance(item, str)]:
            raise UserError(f"{name} holds a {type(not_text[0]).__name__}: a list of strings is needed")
        if not any(text.strip() for text in data):
            raise UserError(f"{name} holds no text")
        data = Dataset.from_dict({"text": list(data)})
    if isinstance(data, dict):  # a DatasetDict
        raise UserError(f"{name} is a dict of splits: pass one, such as dataset['{next(iter(data), 'train')}']")
    if not isinstance(data, Dataset):
        raise UserError(
            f"{name} is a {type(data).__name__}: pass a list of strings, a datasets.Dataset, the name of a data set, or a "
            "tensor of token ids"
        )
    if len(data) == 0:
        raise UserError(f"{name} holds no text")
    columns = sources.source("world", column=column).columns
    return Source(name, name, None, split, columns=columns, section=section, rows=data)


def token_windows(ids_NT: Tensor, name: str, model: PreTrainedModel, has_loss: bool = False) -> Tensor:
    """Checked windows of token ids, (N, T) int64 on the CPU. `has_loss`: the loss on them is wanted."""
    windows_NT = token_ids(ids_NT, name, dims=2)
    if has_loss and windows_NT.shape[1] < 2:
        raise UserError(
            f"{name} holds windows of one token, and a loss is of the tokens after the first: pass longer ones"
        )
    check_ids(windows_NT, name, model)
    return windows_NT


def token_ids(ids: Tensor, name: str, dims: int) -> Tensor:
    if ids.dim() != dims or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        shape = "(windows, tokens)" if dims == 2 else "(tokens,)"
        raise UserError(f"{name} is a {ids.dtype} tensor of {tuple(ids.shape)}: token ids of {shape} are needed")
    return ids.detach().cpu().long().clone()  # a tensor of inference mode cannot be used in training


def check_ids(ids_NT: Tensor, where: object, model: PreTrainedModel) -> None:
    loading.check_length(model.config, "seq_len", ids_NT.shape[1])
    loading.check_vocabulary(model.config, ids_NT, where)
