"""Owns checkpoints that are quantised: how that is recognised, and how one becomes a plain model.

Its scales change what each weight stands for, so they must be applied before anything is measured or pruned. FP8 and
MXFP4 are dequantised by transformers as it loads; a model of bitsandbytes after it was loaded. All else is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.pytorch_utils import Conv1D

from pipeline.runtime import files
from pipeline.runtime.errors import UserError

KEYS = ("quantization_config", "compression_config", "quantization")  # in config.json; the last one of MLX
AT_LOAD = ("fp8", "mxfp4")
AFTER_LOAD = ("int8", "nf4", "fp4")  # of bitsandbytes


def method(folder: Path) -> str | None:
    """How the weights in a model folder are quantised: fp8, mxfp4, int8, nf4, fp4, or as config.json says; None: they are
    not."""
    about = next(_named(files.read_json(folder / "config.json") or {}), None)
    if about is None:
        return None
    name = str(
        about.get("quant_method") or about.get("format") or ("bitsandbytes" if _bits(about) else "an unknown method")
    )
    if name != "bitsandbytes":
        return name
    return "int8" if _bits(about) == 8 else str(about.get("bnb_4bit_quant_type") or "fp4")


def refuse_unknown(folder: Path) -> None:
    """Refuses what cannot be made plain, since pruning needs the weights themselves."""
    if (name := method(folder)) not in (None, *AT_LOAD, *AFTER_LOAD):
        raise UserError(
            f"{folder} is quantised by {name} (quantization_config in config.json), which is not turned back into plain "
            f"weights here, but fp8, mxfp4 and bitsandbytes are: set model=... to the model that it was made from"
        )


def unnamed(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the same model in plain weights."""
    return {
        key: unnamed(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if not (key in KEYS and isinstance(value, dict))
    }


def forget(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same in memory."""
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def arguments(config: PreTrainedConfig, name: str | None, folder: Path, where: dict[str, Any]) -> dict[str, Any]:
    """For from_pretrained, of a checkpoint that is quantised by `name`."""
    if name is None:
        return {}
    if config.dtype is None:
        config.dtype = torch.bfloat16  # transformers would take that of the first tensor in the file
    if name in AT_LOAD:
        text = config.get_text_config(decoder=True)
        about = getattr(config, "quantization_config", None) or text.quantization_config
        config.quantization_config = {**about, "dequantize": True}
        return {"config": config}
    if where:
        raise UserError(
            f"{folder} is quantised by bitsandbytes and cannot be spread over devices: set evaluate.placement=stream"
        )
    return {"config": config, "device_map": {"": "cpu"}}  # where there is a GPU, transformers would load it there


def plain(model: nn.Module, name: str, skeleton: nn.Module) -> nn.Module:
    """The model that was loaded with `arguments`, without any trace of its quantisation. `skeleton`: unquantised."""
    if name in AFTER_LOAD:
        model = model.dequantize(model.config.dtype)
        for path, module in skeleton.named_modules():
            if isinstance(module, Conv1D) and isinstance(linear := model.get_submodule(path), nn.Linear):
                module.weight, module.bias = nn.Parameter(linear.weight.data.T.contiguous()), linear.bias
                model.set_submodule(path, module)  # bitsandbytes made it a Linear
        for attribute in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_4bit_serializable", "is_8bit_serializable"):
            if hasattr(model, attribute):
                delattr(model, attribute)
    forget(model.config)
    dense = {path: type(module) for path, module in skeleton.named_modules()}
    for path, module in model.named_modules():
        if type(module) is not dense.get(path):
            raise UserError(f"{path} stays a {type(module).__name__}: this {name} checkpoint is not understood")
    in_float32 = tuple(model._get_dtype_plan(model.config.dtype))  # parts of names
    for path, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
            raise UserError(f"{path} stays {parameter.dtype}: this {name} checkpoint is not understood")
        if not any(part in path for part in in_float32):  # transformers leaves what the files hold unquantised as it is
            parameter.data = parameter.data.to(skeleton.get_parameter(path).dtype)
    return model


@contextmanager
def whole_blocks() -> Iterator[None]:
    """Meanwhile, transformers dequantises matrices whose last FP8 block is cut off, such as DeepSeek V3's of 576 rows in
    blocks of 128. It takes the size of the blocks from the number of scales: wrong by far for 192 rows and 2 scales."""
    theirs = Fp8Dequantize._dequantize_one

    def padded(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if not block or scales.dim() < 2 or quantized.element_size() != 1 or not quantized.is_floating_point():
            return theirs(self, quantized, scales, output_dtype)
        (rows, columns), (height, width) = quantized.shape[-2:], block
        if tuple(scales.shape[-2:]) != (-(-rows // height), -(-columns // width)):
            return theirs(self, quantized, scales, output_dtype)
        whole = F.pad(quantized.float(), (0, -columns % width, 0, -rows % height))
        return theirs(self, whole, scales, output_dtype)[..., :rows, :columns].contiguous()

    Fp8Dequantize._dequantize_one = padded
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = theirs


def _named(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What says so in config.json: at its top, or of the language model in it."""
    yield from (config[key] for key in KEYS if isinstance(config.get(key), dict))
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield from _named(value)


def _bits(about: dict[str, Any]) -> int | None:
    return 8 if about.get("load_in_8bit") else 4 if about.get("load_in_4bit") else None
