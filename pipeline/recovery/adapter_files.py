"""Saves and loads the adapter folder of a masked LoRA."""

import json
import re
import shutil
from pathlib import Path

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.recovery import sharding
from pipeline.recovery.lora import adapt, base_sample, name_in_files, refresh_all
from pipeline.recovery.masked_linear import ADAPTER
from pipeline.runtime import files
from pipeline.runtime.errors import UserError
from pipeline.sparsity.masks import Masks

# peft has no such adapter type, so its own loader refuses the folder instead of loading it as a dense LoRA
MASKED_TYPE = "MASKED_LORA"
WEIGHTS = "adapter_model.safetensors"  # peft's file name
BASE = "base_sample."  # before the names of `base_sample` in that file


def save_adapter(model: nn.Module, masks_file: Path, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Saves the trained parameters of an attached model (`state`, else the model's own) and its masks; only `load_adapter`
    opens the folder."""
    state = sharding.gather_trained(model) if state is None else state
    folder.mkdir(parents=True, exist_ok=True)
    saved = {_saved_name(name): value for name, value in state.items()}
    saved |= {BASE + name: values for name, values in model.base_sample.items()}
    with files.atomic_write(folder / WEIGHTS) as tmp:
        save_file(saved, tmp, {"format": "pt"})
    shutil.copyfile(masks_file, folder / "masks.safetensors")
    model.masked_lora.save_pretrained(folder)
    about = json.loads((folder / "adapter_config.json").read_text())
    about |= {"peft_type": MASKED_TYPE, "target_modules": sorted(about["target_modules"])}
    files.write_json(folder / "adapter_config.json", about)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Adds the masked LoRA saved in `folder` to the pruned `model`, in place. Raises `UserError` if they do not fit."""
    folder = Path(folder)
    about = files.read_json(folder / "adapter_config.json")
    if about is None or about.get("peft_type") != MASKED_TYPE:
        raise UserError(
            f"{folder} holds no masked LoRA of this project (adapter_config.json with peft_type {MASKED_TYPE})"
        )
    masks = Masks.load(folder / "masks.safetensors")
    masks.refuse_other_order(model.config)
    config = LoraConfig.from_peft_type(**about | {"peft_type": "LORA"})
    try:
        saved = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    sample = {name.removeprefix(BASE): saved.pop(name) for name in list(saved) if name.startswith(BASE)}
    _check_base(sample, base_sample(model, masks, config), folder)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    adapt(model, masks, config, cached=not config.lora_dropout, recompute=True)
    trained = {_saved_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    if differ := saved.keys() ^ trained.keys():
        raise UserError(f"{folder / WEIGHTS} does not fit the model: only one of them has {sorted(differ)[0]}")
    for name, parameter in trained.items():
        if parameter.shape != saved[name].shape:
            raise UserError(f"{folder / WEIGHTS} does not fit the model: {name} has shape {tuple(saved[name].shape)}")
        parameter.data.copy_(saved[name])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):  # trained in float32
            parameter.data = parameter.data.to(dtypes[name_in_files(name)])
    refresh_all(model)
    return model


def _check_base(sample: dict[str, Tensor], loaded: dict[str, Tensor], folder: Path) -> None:
    """Raises `UserError` if the adapter was trained on other weights. Those of another dtype may differ by its rounding."""
    for name in sample.keys() & loaded.keys():
        expected, found = sample[name], loaded[name]
        same_dtype = expected.dtype == found.dtype
        if len(expected) == len(found) and not (
            expected.equal(found) if same_dtype else expected.double().allclose(found.double(), rtol=2**-7, atol=1e-6)
        ):
            raise UserError(
                f"{folder} was trained on other weights than the model has in {name}: pass the model that was fine-tuned, "
                "the run's reconstruct/model or else its prune/model"
            )


def _saved_name(name: str) -> str:
    """The name in peft's files: without the adapter's name. Biases keep .base_layer."""
    return "base_model.model." + re.sub(r"\.parametrizations\.(\w+)\.0\b", r".\1", name).replace(f".{ADAPTER}.", ".")
