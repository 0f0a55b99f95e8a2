"""Owns models: where one is, how it loads. What is in its folder: pipeline/models/model_files.py."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from pipeline.models import dequantize, file_names, model_files
from pipeline.models.architecture import model_class
from pipeline.runtime import caches, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe


def dense_folder(recipe: Recipe, inputs: dict[str, Path]) -> Path:
    """The folder of the dense model: what a pretrain stage made, a local folder, or a hub id's snapshot."""
    if "pretrain" in inputs:
        return inputs["pretrain"] / "model"
    return locate(recipe.model, recipe.revision)


def locate(model: str, revision: str | None) -> Path:
    """A local folder as it is; a hub id is downloaded once (rank by rank from the cache)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            model_files.refuse_adapter(folder)
            raise UserError(f"model={model} is not a model folder: it has no config.json")
        if not any(found for pattern in model_files.WEIGHTS for found in folder.glob(pattern)):
            raise UserError(f"model={model} has no weights: *.safetensors or *.bin are needed")
        return folder
    if model.startswith((".", "/", "~")):
        raise UserError(f"model={model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(model, revision=revision, **model_files.download("*.safetensors")))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(model, revision=revision, **model_files.download("*.bin")))
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
    """Whether `locate` has nothing to fetch (or must not, which it then says)."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if Path(model).expanduser().is_dir() or model.startswith((".", "/", "~")) or constants.HF_HUB_OFFLINE:
        return True
    try:
        found = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return False
    return any(file for pattern in model_files.WEIGHTS for file in found.glob(pattern))


def tokenizer(folder: Path, recipe: Recipe):
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=recipe.trust_remote_code)
    except Exception as error:  # damaged files raise KeyError, AttributeError and more
        config(folder, recipe)  # which the tokenizer is chosen by: what is wrong with it is told as such
        raise UserError(
            f"{folder} has no usable tokenizer: {model_files.problem(folder, error, '*token*.json')}: copy tokenizer.json and "
            "tokenizer_config.json there from the model it was made of"
        ) from error


def config(folder: Path, recipe: Recipe) -> PreTrainedConfig:
    """What `config.json` says, without the weights."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=recipe.trust_remote_code)
    except Exception as error:
        raise UserError(model_files.cannot_load(folder, error, "config.json")) from error


def skeleton(folder: Path, recipe: Recipe, dtype: torch.dtype | None = None) -> nn.Module:
    """The model's modules without their weights, in no time and memory; of its config.json's `dtype` if None."""
    found = dequantize.forget(config(folder, recipe))
    dtype = dtype or found.dtype
    chosen = model_class(folder, found, recipe.trust_remote_code)
    try:
        with torch.device("meta"):
            if chosen is AutoModelForCausalLM:
                return chosen.from_config(found, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
            return chosen._from_config(found, dtype=dtype)
    except Exception as error:
        raise UserError(model_files.cannot_load(folder, error, "config.json")) from error


def quantization(folder: Path) -> str | None:
    """How the weights in a folder are quantised (fp8, mxfp4, int8, nf4, fp4), which `load` undoes; None: they are plain."""
    return dequantize.method(folder)


def load(folder: Path, recipe: Recipe, dtype: str | None = None, quantization=None, **where: Any) -> nn.Module:
    """The model on the CPU in evaluation mode, whole (of a multimodal one too) and in plain weights.

    In the file's own dtype its weights are a lazy view of the files, which the ranks of a node share. `dtype` overrides the
    recipe's; `quantization` quantises plain weights, see pipeline/recovery/quantization.py; `where` takes it elsewhere, by the
    `device_map` and `max_memory` of transformers. Raises `UserError` where the files are not exactly such a model's.
    """
    dtype, found, quantized = dtype or recipe.dtype, config(folder, recipe), dequantize.method(folder)
    dequantize.refuse_unknown(folder)
    assert not (quantized and quantization), "weights are quantised on the way in only where they are plain"
    chosen = model_class(folder, found, recipe.trust_remote_code)
    options = dequantize.arguments(found, quantized, folder, where)
    if quantization:
        options["quantization_config"] = quantization  # None would make transformers ignore the checkpoint's own
    if recipe.attn_implementation:
        options["attn_implementation"] = recipe.attn_implementation
    in_files = model_files.opened(folder)
    try:
        with dequantize.whole_blocks():
            model, info = chosen.from_pretrained(
                folder,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                trust_remote_code=recipe.trust_remote_code,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                **options,
                **where,
            )
    except Exception as error:  # safetensors, pickle, json and transformers each have their own
        raise UserError(model_files.cannot_load(folder, error)) from error
    refuse_differences(folder, in_files, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    if quantized:
        model = dequantize.plain(model, quantized, skeleton(folder, recipe, model.config.dtype))
        file_names.remember(model, in_files)
        dtype = str(model.dtype).removeprefix("torch.")
        processes.say(f"  {folder} is quantised ({quantized}): its weights are dequantised to {dtype}, and written so")
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    return model.eval()


def refuse_differences(
    folder: Path, in_files: model_files.Tensors, missing: set[str], unexpected: set[str], mismatched: set[tuple]
) -> None:
    """Refuses files that do not hold exactly the model's weights."""
    unexpected = {name for name in unexpected if not in_files.is_old_buffer(name)}
    for name, in_files, in_model in sorted(mismatched):
        raise UserError(f"{folder}: {name} is {tuple(in_files)} in the files, {tuple(in_model)} by config.json")
    if missing:  # transformers would fill them with random numbers
        raise UserError(
            f"{folder} lacks {min(missing)} ({len(missing)} missing in all): is a file missing, or config.json another model's?"
        )
    if unexpected:  # transformers would leave them out
        raise UserError(
            f"{folder} holds {min(unexpected)}, which its config.json has no place for ({len(unexpected)} "
            "in all): is it another model's?"
        )


def positions(config: PreTrainedConfig) -> int | None:
    """How long a text the model takes, where its configuration says so; XLNet's -1 means any."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if found and found > 0 else None


def check_length(config: PreTrainedConfig, key: str, seq_len: int) -> None:
    known = positions(config)
    if known and seq_len > known:
        raise UserError(f"{key}={seq_len} exceeds the model's {known} positions: set {key}={known}")


def check_vocabulary(config, ids: Tensor, source) -> None:
    """Rows of ready `input_ids` may come from another tokenizer."""
    vocabulary = config.get_text_config().vocab_size
    if strange := ids[(ids < 0) | (ids >= vocabulary)].tolist():
        raise UserError(
            f"{source} holds token {strange[0]}, the model knows {vocabulary}: was it tokenised for another model?"
        )
