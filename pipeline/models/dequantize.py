"""Recognises quantised checkpoints and turns them into plain models.

The scales are part of the weights, so they must be applied before measuring or pruning. transformers dequantises FP8 and
MXFP4 while loading; we dequantise bitsandbytes models after loading. Everything else is refused.
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

KEYS = ("quantization_config", "compression_config", "quantization")  # in config.json; the last is MLX's
AT_LOAD = ("fp8", "mxfp4")
AFTER_LOAD = ("int8", "nf4", "fp4")  # of bitsandbytes


def method(folder: Path) -> str | None:
    """How the weights in a model folder are quantised: fp8, mxfp4, int8, nf4, fp4 or what config.json says; None if not."""
    settings = next(_quantization_configs(files.read_json(folder / "config.json") or {}), None)
    if settings is None:
        return None
    name = str(
        settings.get("quant_method")
        or settings.get("format")
        or ("bitsandbytes" if _bits(settings) else "an unknown method")
    )
    if name != "bitsandbytes":
        return name
    return "int8" if _bits(settings) == 8 else str(settings.get("bnb_4bit_quant_type") or "fp4")


def refuse_unknown(folder: Path) -> None:
    """Raises `UserError` if the weights cannot be dequantised: pruning needs the weights themselves."""
    if (name := method(folder)) not in (None, *AT_LOAD, *AFTER_LOAD):
        raise UserError(
            f"{folder} is quantised by {name} (quantization_config in config.json), which cannot be dequantised here (fp8, "
            "mxfp4 and bitsandbytes can): set model=... to the unquantised model"
        )


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of config.json without quantisation."""
    return {
        key: without_quantization(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if not (key in KEYS and isinstance(value, dict))
    }


def drop_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """Removes the quantisation from a loaded configuration."""
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def load_arguments(config: PreTrainedConfig, name: str | None, folder: Path, where: dict[str, Any]) -> dict[str, Any]:
    """Arguments of from_pretrained for a checkpoint quantised by `name`."""
    if name is None:
        return {}
    if config.dtype is None:
        config.dtype = torch.bfloat16  # transformers would use the dtype of the first tensor in the file
    if name in AT_LOAD:
        text = config.get_text_config(decoder=True)
        settings = getattr(config, "quantization_config", None) or text.quantization_config
        config.quantization_config = {**settings, "dequantize": True}
        return {"config": config}
    if where:
        raise UserError(
            f"{folder} is quantised by bitsandbytes and cannot be split over devices: set evaluate.placement=stream"
        )
    return {"config": config, "device_map": {"": "cpu"}}  # transformers would load it onto a GPU if there is one


def dequantized(model: nn.Module, name: str, skeleton: nn.Module) -> nn.Module:
    """Dequantises a model loaded with `load_arguments` and removes all traces of it. `skeleton`: the same model, unquantised.
    Raises `UserError` if a module or parameter stays quantised."""
    if name in AFTER_LOAD:
        model = model.dequantize(model.config.dtype)
        for path, module in skeleton.named_modules():
            if isinstance(module, Conv1D) and isinstance(linear := model.get_submodule(path), nn.Linear):
                module.weight, module.bias = nn.Parameter(linear.weight.data.T.contiguous()), linear.bias
                model.set_submodule(path, module)  # bitsandbytes made it a Linear
        for attribute in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_4bit_serializable", "is_8bit_serializable"):
            if hasattr(model, attribute):
                delattr(model, attribute)
    drop_quantization(model.config)
    dense = {path: type(module) for path, module in skeleton.named_modules()}
    for path, module in model.named_modules():
        if type(module) is not dense.get(path):
            raise UserError(f"{path} stays a {type(module).__name__}: this {name} checkpoint is not supported")
    in_float32 = tuple(model._get_dtype_plan(model.config.dtype))  # name parts
    for path, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
            raise UserError(f"{path} stays {parameter.dtype}: this {name} checkpoint is not supported")
        if not any(part in path for part in in_float32):  # transformers keeps the dtype of unquantised tensors
            parameter.data = parameter.data.to(skeleton.get_parameter(path).dtype)
    return model


@contextmanager
def partial_fp8_blocks() -> Iterator[None]:
    """Makes transformers dequantise matrices whose last FP8 block is partial, such as 576 rows in blocks of 128 (DeepSeek
    V3). By itself it infers the block size from the number of scales, which is wrong for 192 rows and 2 scales."""
    original = Fp8Dequantize._dequantize_one

    def dequantize_padded(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if not block or scales.dim() < 2 or quantized.element_size() != 1 or not quantized.is_floating_point():
            return original(self, quantized, scales, output_dtype)
        (rows, columns), (height, width) = quantized.shape[-2:], block
        if tuple(scales.shape[-2:]) != (-(-rows // height), -(-columns // width)):
            return original(self, quantized, scales, output_dtype)
        padded = F.pad(quantized.float(), (0, -columns % width, 0, -rows % height))
        return original(self, padded, scales, output_dtype)[..., :rows, :columns].contiguous()

    Fp8Dequantize._dequantize_one = dequantize_padded
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = original


def _quantization_configs(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The quantisation settings in config.json: top-level, then those of the language model in it."""
    yield from (config[key] for key in KEYS if isinstance(config.get(key), dict))
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield from _quantization_configs(value)


def _bits(settings: dict[str, Any]) -> int | None:
    return 8 if settings.get("load_in_8bit") else 4 if settings.get("load_in_4bit") else None
