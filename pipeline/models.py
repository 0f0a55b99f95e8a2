"""Owns model folders: where a model is, what it is known by, how it loads, what is copied beside new weights."""

import json
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from pipeline import files
from pipeline.errors import UserError
from pipeline.recipe import Recipe

WEIGHTS = ("*.safetensors", "*.bin")
IDENTITY = ("config.json", "tokenizer*", "vocab*", "merges*", "*.model", "*.py")  # beside the weights
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")  # configuration, tokenizer, remote code


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
            raise UserError(f"model={model} is not a model folder: it has no config.json")
        if not any(found for pattern in WEIGHTS for found in folder.glob(pattern)):
            raise UserError(f"model={model} has no weights: *.safetensors or *.bin are needed")
        return folder
    if model.startswith((".", "/", "~")):
        raise UserError(f"model={model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(model, revision=revision, allow_patterns=[*BESIDE, "*.safetensors"]))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(model, revision=revision, allow_patterns=[*BESIDE, "*.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot fetch model={model}: {str(error).splitlines()[0]} (a local folder works too: model=./folder)"
        ) from error
    return found


def identity(folder: Path) -> str:
    return files.fingerprint({path for pattern in (*WEIGHTS, *IDENTITY) for path in folder.glob(pattern)})


def tokenizer(folder: Path, recipe: Recipe):
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=recipe.trust_remote_code)
    except Exception as error:  # damaged files raise KeyError, AttributeError and more
        raise UserError(
            f"{folder} has no usable tokenizer: {_problem(error, folder, '*token*.json')}: copy tokenizer.json and "
            "tokenizer_config.json there from the model it was made of"
        ) from error


def config(folder: Path, recipe: Recipe) -> PreTrainedConfig:
    """What `config.json` says, without the weights."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=recipe.trust_remote_code)
    except Exception as error:
        raise UserError(f"cannot load the model in {folder}: {_problem(error, folder, 'config.json')}") from error


def skeleton(folder: Path, recipe: Recipe) -> nn.Module:
    """The model's modules without their weights, in no time and memory."""
    found = config(folder, recipe)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(found, trust_remote_code=recipe.trust_remote_code)
    except Exception as error:
        raise UserError(f"cannot load the model in {folder}: {_problem(error, folder, 'config.json')}") from error


def load(folder: Path, recipe: Recipe, dtype: str | None = None, quantization=None, **where: Any) -> nn.Module:
    """The model on the CPU in evaluation mode. In the file's own dtype its weights are a lazy view of the files, which
    the ranks of a node share. `dtype` overrides the recipe's; `quantization`: see pipeline/quantize.py; `where` takes
    it elsewhere, by the `device_map` and `max_memory` of transformers."""
    _refuse_names_outside(folder)
    dtype = dtype or recipe.dtype
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            quantization_config=quantization,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **where,
        )
    except Exception as error:  # safetensors, pickle, json and transformers each have their own
        problem = _problem(error, folder, "config.json", "*.index.json", "*.safetensors", "pytorch_model*.bin")
        raise UserError(f"cannot load the model in {folder}: {problem}") from error
    for name, in_files, in_model in sorted(info["mismatched_keys"]):
        raise UserError(f"{folder}: {name} is {tuple(in_files)} in the files, {tuple(in_model)} by config.json")
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(
            f"{folder} lacks {missing[0]} ({len(missing)} missing in all): is a file missing, or config.json another model's?"
        )
    model.config.use_cache = False
    return model.eval()


def _refuse_names_outside(folder: Path) -> None:
    """An index that somebody else wrote must not make us read files beside the model."""
    for index in folder.glob("*.index.json"):
        shards = (files.read_json(index) or {}).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ():
            if Path(str(shard)).name != shard:
                raise UserError(f"{index} names the shard '{shard}', which is not a file of its folder")


def _problem(error: Exception, folder: Path, *patterns: str) -> str:
    """In words that say what to do about it: transformers' own run to a page, or to the name of a missing key."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is run only with trust_remote_code=true: read it before you type that"
    return damage(folder, *patterns) or textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")


def damage(folder: Path, *patterns: str) -> str | None:
    """What is wrong with the first file of a folder that cannot be read: the loaders' own errors name no file."""
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        try:
            if path.suffix == ".json":
                found = dict(json.loads(path.read_text()))
                if path.name.endswith(".index.json") and "weight_map" not in found:
                    raise UserError("it has no weight_map")
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            else:
                torch.load(path, weights_only=True, map_location="meta")
        except Exception as error:
            size = f"{path.stat().st_size} bytes" if path.exists() else "a link to nothing"
            reason = str(error).split(". ")[0] or type(error).__name__
            return f"{path.name} ({size}) is damaged or was not fetched whole: {reason}"
    return None


def check_length(config, key: str, seq_len: int) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and seq_len > positions:
        raise UserError(f"{key}={seq_len} exceeds the model's {positions} positions: type {key}={positions}")


def check_vocabulary(config, ids: Tensor, source) -> None:
    """Rows of ready `input_ids` may come from another tokenizer."""
    vocabulary = config.get_text_config().vocab_size
    if strange := ids[(ids < 0) | (ids >= vocabulary)].tolist():
        raise UserError(
            f"{source} holds token {strange[0]}, the model knows {vocabulary}: was it tokenised for another model?"
        )


def copy_beside(origin: Path, target: Path, dtype: str = "auto") -> None:
    """Copies all but the weights, so that the new folder loads as the old one did."""
    for pattern in BESIDE:
        for path in origin.glob(pattern):
            if not path.name.endswith(".index.json"):
                with files.whole(target / path.name) as beside:
                    shutil.copyfile(path, beside)
    if dtype != "auto":
        config = json.loads((target / "config.json").read_text())
        config.pop("torch_dtype", None)
        files.write_json(target / "config.json", {**config, "dtype": dtype})


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each weight in a folder of safetensors, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def write_index(folder: Path) -> None:
    """`model.safetensors.index.json` over the shards of a folder."""
    sizes, where = 0, {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                where[name] = path.name
        sizes += path.stat().st_size
    files.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": sizes}, "weight_map": where})
