"""Writes safetensors files and hashes them at the same time: to read a layer again can take longer than to prune it."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.runtime import files

METADATA = {"format": "pt"}
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save(tensors: dict[str, Tensor], path: Path) -> str:
    """Writes tensors on the host as transformers reads them; returns the file's SHA-256. Raises `UserError` as
    `files.atomic_write` does."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))  # each is aligned
    with files.atomic_write(path) as tmp:
        if not DTYPES.keys() >= {tensor.dtype for tensor in ordered.values()}:
            save_file({name: tensor.contiguous() for name, tensor in ordered.items()}, tmp, METADATA)
            return files.sha256(tmp)
        arrays = (tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in ordered.values())
        parts = [_header(ordered), *(memoryview(array) for array in arrays if len(array))]
        with open(tmp, "wb") as file, ThreadPoolExecutor(1) as pool:
            hashing = pool.submit(_sha256, parts)
            for part in parts:
                file.write(part)
        return hashing.result()


def _header(tensors: dict[str, Tensor]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": METADATA}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()
