"""Locates models and loads them, with their configuration. The files themselves: models/model_files.py; tokenizers:
models/processors.py."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from pipeline.models import dequantize, file_names, model_files
from pipeline.models.architecture import model_class
from pipeline.models.pointwise import mark_pointwise
from pipeline.runtime import caches, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe

# families whose first position is the one after that of the padding token: RoBERTa's 514 take 512 tokens
AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def dense_folder(recipe: Recipe, inputs: dict[str, Path]) -> Path:
    """The folder of the dense model: the permute stage's, else the pretrain stage's, else that of the setting `model`."""
    for stage in ("permute", "pretrain"):
        if stage in inputs:
            return inputs[stage] / "model"
    return locate(recipe.model, recipe.revision)


def locate(model: str, revision: str | None) -> Path:
    """A local folder as it is; a hub id is downloaded once. Raises `UserError` if there is no model."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            model_files.refuse_adapter(folder)
            raise UserError(f"model={model} has no config.json: set model=... to a model folder or a hub id")
        if not any(found for pattern in model_files.WEIGHTS for found in folder.glob(pattern)):
            raise UserError(f"model={model} has no weights: it needs *.safetensors or *.bin")
        return folder
    if model.startswith((".", "/", "~")):
        raise UserError(f"model={model}: no such folder")
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = _snapshot(model, revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if unusable := caches.problem(error):
            raise UserError(unusable) from error
        raise UserError(
            f"cannot fetch model={model}: {str(error).splitlines()[0]} (a local folder works too: model=./folder)"
        ) from error
    if not (found / "config.json").is_file():
        model_files.refuse_adapter(found)
    return found


def is_here(model: str, revision: str | None) -> bool:
    """Whether `locate` downloads nothing: the model is on this machine, or HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    if Path(model).expanduser().is_dir() or model.startswith((".", "/", "~")) or constants.HF_HUB_OFFLINE:
        return True
    try:
        found = _snapshot(model, revision, local_files_only=True)
    except (LocalEntryNotFoundError, OSError, ValueError):
        return False
    return bool(model_files.weight_files(found))


def _snapshot(model: str, revision: str | None, **where: bool) -> Path:
    """The folder in the hub's cache with all that a model needs; *.bin only where transformers finds no *.safetensors."""
    from huggingface_hub import snapshot_download

    for weights in model_files.WEIGHTS:
        found = Path(snapshot_download(model, revision=revision, **where, **model_files.download(weights)))
        if model_files.weight_files(found):
            break
    return found


def config(folder: Path, recipe: Recipe) -> PreTrainedConfig:
    """The model's config.json. Raises `UserError` if it is unreadable."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=recipe.trust_remote_code)
    except Exception as error:
        raise UserError(model_files.cannot_load(folder, error, "config.json")) from error


def skeleton(folder: Path, recipe: Recipe, dtype: torch.dtype | None = None) -> nn.Module:
    """The model on the meta device, without weights; in the dtype of its config.json if `dtype` is None."""
    model = _built(folder, recipe, dtype, torch.device("meta"))
    return mark_pointwise(model) if recipe.prune.pointwise else model


def set_own_buffers(model: nn.Module, folder: Path, recipe: Recipe) -> None:
    """Computes the buffers that no file holds of a model that brings its own code, such as rotary frequencies. transformers 5
    leaves them uninitialised, unless the code also computes them in `_init_weights`, as its own models do."""
    if type(model).__module__.startswith("transformers."):
        return
    built = _built(folder, recipe, model.dtype, init_empty_weights(include_buffers=False))
    in_files = built.state_dict()
    for name, buffer in built.named_buffers():
        if name not in in_files:
            model.get_buffer(name).copy_(buffer)


def _built(folder: Path, recipe: Recipe, dtype: torch.dtype | None, where: AbstractContextManager) -> nn.Module:
    found = dequantize.drop_quantization(config(folder, recipe))
    dtype = dtype or found.dtype
    chosen = model_class(folder, found, recipe.trust_remote_code)
    try:
        with where:
            if hasattr(chosen, "from_config"):  # an Auto class
                return chosen.from_config(found, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
            return chosen._from_config(found, dtype=dtype)
    except Exception as error:
        raise UserError(model_files.cannot_load(folder, error, "config.json")) from error


def quantization(folder: Path) -> str | None:
    """How the weights in a folder are quantised (fp8, mxfp4, int8, nf4, fp4), which `load` undoes; None if they are not."""
    return dequantize.method(folder)


def load(folder: Path, recipe: Recipe, dtype: str | None = None, quantization=None, **where: Any) -> nn.Module:
    """The whole model (also a multimodal one) on the CPU, dequantised, in evaluation mode.

    In the files' own dtype its weights are a lazy view of the files, which the ranks of a node share. `dtype` overrides the
    recipe's. `quantization` quantises plain weights (see recovery/quantization.py). `where` is passed on to place the model:
    `device_map` and `max_memory` of transformers. Raises `UserError` if the files do not hold exactly this model's weights.
    """
    dtype, found, quantized = dtype or recipe.dtype, config(folder, recipe), dequantize.method(folder)
    dequantize.refuse_unknown(folder)
    assert not (quantized and quantization), "only plain weights can be quantised while loading"
    chosen = model_class(folder, found, recipe.trust_remote_code)
    options = dequantize.load_arguments(found, quantized, folder, where)
    if quantization:
        options["quantization_config"] = quantization  # None would make transformers ignore the checkpoint's own
    if recipe.attn_implementation:
        options["attn_implementation"] = recipe.attn_implementation
    in_files = model_files.open_weights(folder)
    try:
        with dequantize.partial_fp8_blocks():
            model, info = chosen.from_pretrained(
                folder,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                trust_remote_code=recipe.trust_remote_code,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                **options,
                **where,
            )
    except Exception as error:  # safetensors, pickle, json and transformers raise their own types
        raise UserError(model_files.cannot_load(folder, error)) from error
    refuse_differences(folder, in_files, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    set_own_buffers(model, folder, recipe)
    if quantized:
        model = dequantize.dequantized(model, quantized, skeleton(folder, recipe, model.config.dtype))
        file_names.set_file_names(model, in_files)
        dtype = str(model.dtype).removeprefix("torch.")
        processes.say(
            f"  {folder} is quantised ({quantized}): its weights are dequantised to {dtype}, also in the output"
        )
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    if recipe.prune.pointwise:
        mark_pointwise(model)
    return model.eval()


def refuse_differences(
    folder: Path, in_files: model_files.Tensors, missing: set[str], unexpected: set[str], mismatched: set[tuple]
) -> None:
    """Raises `UserError` unless the files hold exactly the model's weights."""
    unexpected = {name for name in unexpected if not in_files.is_old_buffer(name)}
    for name, in_files, in_model in sorted(mismatched):
        raise UserError(f"{folder}: {name} is {tuple(in_files)} in the files, but {tuple(in_model)} by config.json")
    if missing:  # transformers would fill them with random numbers
        raise UserError(
            f"{folder} lacks {min(missing)} ({len(missing)} missing): is a file missing, or config.json another model's?"
        )
    if unexpected:  # transformers would ignore them
        raise UserError(
            f"{folder} holds {min(unexpected)}, which its config.json does not define ({len(unexpected)} such): is "
            "config.json another model's?"
        )


def positions(config: PreTrainedConfig) -> int | None:
    """The longest text that the model takes, in tokens; None if its configuration sets no limit, as XLNet's -1."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None)
    if found and text.model_type in AFTER_PADDING:
        found -= text.pad_token_id + 1
    return found if found and found > 0 else None


def check_length(config: PreTrainedConfig, key: str, seq_len: int) -> None:
    """Raises `UserError` if `seq_len` exceeds the positions of the model."""
    known = positions(config)
    if known and seq_len > known:
        raise UserError(f"{key}={seq_len} exceeds the model's {known} positions: set {key}={known}")


def check_vocabulary(config, ids: Tensor, source) -> None:
    """Raises `UserError` if `ids` hold an unknown token: rows of `input_ids` may come from another tokenizer."""
    vocabulary = config.get_text_config().vocab_size
    if strange := ids[(ids < 0) | (ids >= vocabulary)].tolist():
        raise UserError(
            f"{source} holds token {strange[0]}, but the model knows {vocabulary}: was it tokenised for another model?"
        )
