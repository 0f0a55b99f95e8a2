"""The files of a model folder: which ones transformers loads, what is wrong with them, and how to write a new folder's
config, tokenizer and index."""

import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.models import dequantize
from pipeline.runtime import files
from pipeline.runtime.errors import UserError

WEIGHTS = ("*.safetensors", "*.bin")
# besides the weights
CONFIGURATION = ("config.json", "generation_config.json", "*processor_config.json", "*.jinja", "*.py")
VOCABULARY = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
)
OTHER_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "additional_chat_templates/*.jinja")
# in transformers' order of preference; each may have an index instead
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
LOADED = ("config.json", "*.index.json", "*.safetensors", "pytorch_model*.bin")
PEFT = ("base_model.model.", ".base_layer.")  # in a PeftModel's parameter names


def identity(folder: Path) -> str:
    """A fingerprint of a model folder's weights, configs, tokenizer, chat template and code."""
    return files.fingerprint(
        {path for pattern in (*WEIGHTS, *CONFIGURATION, *VOCABULARY) for path in folder.glob(pattern)}
    )


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers loads: neither `consolidated.safetensors` nor an adapter's."""
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
        if index := files.read_json(folder / f"{name}.index.json"):
            shards = index.get("weight_map")
            return (
                [folder / str(shard) for shard in sorted(set(map(str, shards.values())))]
                if isinstance(shards, dict)
                else []
            )
    return []


def download(weights: str) -> dict[str, list[str]]:
    """Patterns for huggingface_hub that skip copies of the weights in other formats (`original/`, `onnx/`, ...)."""
    folders = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*"]  # here * also matches /; keeps additional_chat_templates/
    return {"allow_patterns": [*OTHER_FILES, weights], "ignore_patterns": ["consolidated*", *folders]}


def open_weights(folder: Path) -> "Tensors":
    """The weights of a folder. Raises `UserError` if transformers could not load them, or would load something else."""
    _check_folder(folder)
    try:
        found = Tensors(folder)
    except Exception as error:  # safetensors, pickle and the system raise their own types
        raise UserError(cannot_load(folder, error)) from error
    _check_names(folder, found)
    _refuse_unscaled(folder, found)
    return found


def cannot_load(folder: Path, error: Exception, *patterns: str) -> str:
    """The message for a model that cannot be loaded, naming the damaged file if there is one."""
    return f"cannot load the model in {folder}: {problem(folder, error, *(patterns or LOADED))}"


def problem(folder: Path, error: Exception, *patterns: str) -> str:
    """Why a load failed, for the user: errors of transformers fill a page, or only name a missing key."""
    if "trust_remote_code" in str(error):
        return "it contains code, which is run only with trust_remote_code=true: read it before you set that"
    return damage(folder, *patterns) or textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")


class Tensors:
    """The tensors in a folder's weight files, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Any] = {}  # by tensor name
        self.bins: dict[str, Tensor] = {}
        for path in weight_files(folder):
            if path.suffix == ".safetensors":
                file = safe_open(path, framework="pt")
                self.files |= dict.fromkeys(file.keys(), file)
            else:
                with open(path, "rb") as file:
                    mmap = file.read(2) == b"PK"  # zip format; files from before torch 1.6 can only be read whole
                self.bins |= torch.load(path, mmap=mmap, weights_only=True, map_location="cpu")

    def __iter__(self) -> Iterator[str]:
        return iter([*self.files, *self.bins])

    def read(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name) if name in self.files else self.bins[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape() if name in self.files else self.bins[name].shape)

    def is_float8(self, name: str) -> bool:
        return name in self.files and self.files[name].get_slice(name).get_dtype().startswith("F8_E4M3")

    def is_old_buffer(self, name: str) -> bool:
        """Whether `name`, with or without prefix, is a buffer that old checkpoints hold and models now compute: a causal mask
        (1, 1, T, T), its fill value, rotary frequencies. transformers knows only some of them."""
        if not re.search(r"\.(masked_bias|causal_mask|inv_freq|bias)$", f".{name}"):
            return False
        shapes = {len(self.shape(stored)) for stored in self if name.endswith(stored) or stored.endswith(f".{name}")}
        return shapes == {4} if re.search(r"(^|\.)(causal_mask|bias)$", name) else shapes <= {0, 1}


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields name and tensor of each weight in a folder of safetensors, one at a time, as stored."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _check_folder(folder: Path) -> None:
    """Raises `UserError` if transformers would load something other than the model in the folder."""
    _refuse_outside_paths(folder)
    if (adapter := folder / "adapter_config.json").exists():
        raise UserError(
            f"{adapter} makes transformers load an adapter onto the model in {folder}: if it is merged, move the "
            f"adapter's files (adapter_*) to another folder; else merge it first"
        )


def _refuse_unscaled(folder: Path, tensors: Tensors) -> None:
    """Refuses 8-bit floats without their scales: transformers would load them unscaled."""
    names = set(tensors)
    for name in filter(tensors.is_float8, tensors.files):
        scales = {f"{name}_scale_inv", *(name.removesuffix(".weight") + end for end in (".scale", ".qscale_weight"))}
        if not names & scales:
            raise UserError(
                f"{folder}: {name} holds 8-bit floats without scales that transformers knows: set model=... to the "
                "unquantised model"
            )


def _check_names(folder: Path, names: Iterable[str]) -> None:
    """Refuses a PeftModel's parameter names."""
    for name in names:
        if any(part in name for part in PEFT):
            raise UserError(
                f"{folder} holds the weights of a PeftModel ({name}), which cannot be loaded as a model: load it with peft "
                "and save the result of merge_and_unload()"
            )


def refuse_adapter(folder: Path, key: str = "model") -> None:
    """Refuses an adapter folder without a model, and names the adapter's base model."""
    if (about := files.read_json(folder / "adapter_config.json")) is not None:
        base = about.get("base_model_name_or_path") or "its base model"
        raise UserError(
            f"{key}={folder} is an adapter of {base} (adapter_config.json), not a model: set {key}={base}, or merge the "
            "adapter with peft's merge_and_unload(), save the result and set its folder"
        )


def _refuse_outside_paths(folder: Path) -> None:
    """Refuses an index whose shards lie outside the folder: it must not make us read other files."""
    for index in folder.glob("*.index.json"):
        shards = (files.read_json(index) or {}).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ():
            if Path(str(shard)).name != shard:
                raise UserError(f"{index} names the shard '{shard}', which is not a file in its folder")


def damage(folder: Path, *patterns: str) -> str | None:
    """What is wrong with the first unreadable file of a folder, or None; the loaders' own errors name no file."""
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
            size = f"{path.stat().st_size} bytes" if path.exists() else "a broken link"
            reason = str(error).split(". ")[0] or type(error).__name__
            return f"{path.name} ({size}) is damaged or incomplete: {reason}"
    return None


def copy_other_files(origin: Path, target: Path, dtype: str = "auto") -> None:
    """Copies everything but the weights, and removes quantisation from config.json, so that the new folder loads."""
    for pattern in OTHER_FILES:
        for path in origin.glob(pattern):
            if not path.name.endswith(".index.json"):
                with files.atomic_write(target / path.relative_to(origin)) as tmp:
                    shutil.copyfile(path, tmp)
    config = json.loads((target / "config.json").read_text())
    plain = dequantize.without_quantization(config)
    if dtype != "auto":
        plain.pop("torch_dtype", None)
        plain["dtype"] = dtype
    if plain != config:
        files.write_json(target / "config.json", plain)


def write_index(folder: Path) -> None:
    """Writes `model.safetensors.index.json` for the shards in a folder."""
    sizes, where = 0, {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                where[name] = path.name
        sizes += path.stat().st_size
    files.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": sizes}, "weight_map": where})
