"""The compact format: a pruned matrix as one bit per weight and the kept values. Specification: docs/compact-format.md.

Shapes: E = experts, O = out_features, I = in_features. A compact matrix is (O, I) or (E, O, I), however the model stores it;
its rows are all O, or all E * O.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.runtime import files
from pipeline.runtime.errors import UserError
from pipeline.sparsity.packed import pack, unpack

MANIFEST = "compact.json"
FORMAT, VERSION = "espalier-compact", 2
READS = (1, 2)  # 1 has no int8
MASK, VALUES, SCALES = "#mask", "#values", "#scales"  # suffixes of a parameter's name, which never contains #
KINDS = ("exact", "int8")  # of values
LARGEST = 127  # int8 value
# not `model-*`: transformers would load such files and fill the missing weights with random numbers
SHARDS = "compact-*.safetensors"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # torch name: safetensors name
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per weight: to compare and copy its bits


@dataclass(frozen=True)
class Layout:
    """The entry of a matrix in compact.json."""

    # as the model stores it: (O, I), (E, O, I), or with the last two swapped; (O, I, 1, 1) of a 1x1 convolution
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool  # stored (I, O)
    patterns: tuple[str, ...]
    values: str = "exact"  # one of KINDS

    @property
    def rows(self) -> int:
        return math.prod(self.shape_OI[:-1])

    @property
    def shape_OI(self) -> tuple[int, ...]:
        if len(self.shape) == 4:
            return self.shape[:2]
        *experts, outs, ins = self.shape
        return (*experts, ins, outs) if self.transposed else self.shape

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "shape": list(self.shape),
            "dtype": dtype,
            "transposed": self.transposed,
            "patterns": list(self.patterns),
            "values": self.values,
        }

    def parts(self) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        """By suffix, the tensors that a matrix consists of: safetensors dtype, and shape (None: as many as are kept)."""
        own = DTYPES[str(self.dtype).removeprefix("torch.")]
        parts = {MASK: ("U8", (math.ceil(self.weights / 8),)), VALUES: (own, (None,))}
        return parts if self.values == "exact" else parts | {VALUES: ("I8", (None,)), SCALES: ("F32", (self.rows,))}

    @staticmethod
    def from_json(about: dict[str, Any]) -> "Layout":
        """Raises `ValueError`, `KeyError` or `TypeError` if `about` is not a valid entry."""
        shape, dtype, transposed = tuple(about["shape"]), about["dtype"], about["transposed"]
        known = len(shape) in (2, 3) or (len(shape) == 4 and shape[2:] == (1, 1) and not transposed)
        if not known or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"shape {shape}")
        if dtype not in DTYPES or type(transposed) is not bool:
            raise ValueError(f"dtype {dtype}, transposed {transposed}")
        if (values := about.get("values", "exact")) not in KINDS:
            raise ValueError(f"values {values}")
        return Layout(shape, getattr(torch, dtype), transposed, tuple(map(str, about["patterns"])), values)


@dataclass(frozen=True)
class Compact:
    """A pruned matrix: `bits` (ceil(weights / 8),) uint8, the mask flattened, lowest bit first; `values` (kept,), and for int8
    `scales` (rows,) float32: a weight is its value times its row's scale, rounded to the matrix's dtype."""

    name: str
    layout: Layout
    bits: Tensor
    values: Tensor
    scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def tensors(self) -> dict[str, Tensor]:
        """As they are named in a file."""
        parts = {MASK: self.bits, VALUES: self.values, SCALES: self.scales}
        return {self.name + suffix: tensor for suffix, tensor in parts.items() if tensor is not None}

    def dense(self) -> Tensor:
        """The matrix as the model stores it, bit for bit (int8: dequantised). Raises `UserError` if they disagree."""
        mask = unpack(self.bits, self.layout.shape_OI).numpy()
        kept_R = np.count_nonzero(mask.reshape(self.layout.rows, -1), axis=1)
        if (kept := int(kept_R.sum())) != len(self.values):
            raise UserError(f"{self.name} is damaged: its mask keeps {kept} weights, but there are {len(self.values)}")
        values = self.values
        if self.scales is not None:
            scales = self.scales.repeat_interleave(torch.from_numpy(kept_R))
            values = (values.float() * scales).to(self.layout.dtype)
        dense = torch.zeros(self.layout.shape_OI, dtype=self.layout.dtype)
        _bits_of(dense).numpy()[mask] = _bits_of(values).numpy()
        return dense.transpose(-1, -2).contiguous() if self.layout.transposed else dense.view(self.layout.shape)


def compress(
    name: str, weight: Tensor, mask: Tensor, transposed: bool, patterns: tuple[str, ...], values: str = "exact"
) -> Compact:
    """Compresses a weight with its mask, both as stored. Raises `UserError` if a pruned weight is not +0.0, or if `values` is
    int8 and a weight is not finite."""
    if str(weight.dtype).removeprefix("torch.") not in DTYPES:
        raise UserError(f"{name} is {weight.dtype}: only float64, float32, float16 and bfloat16 have a compact form")
    layout = Layout(tuple(weight.shape), weight.dtype, transposed, patterns, values)
    if transposed:
        weight, mask = weight.transpose(-1, -2), mask.transpose(-1, -2)
    if values == "int8" and not weight.float().isfinite().all():
        raise UserError(f"{name} holds weights that are not finite: set values=exact")
    mask, words = mask.contiguous(), _bits_of(weight.contiguous())
    kept = words.numpy()[mask.numpy()]
    if np.count_nonzero(words.numpy()) != np.count_nonzero(kept):
        raise UserError(
            f"{name} holds pruned weights that are not +0.0: run `python launch.py apply`, and export its result"
        )
    found = Compact(name, layout, pack(mask), torch.from_numpy(kept).view(weight.dtype))
    if values == "exact":
        return found
    scale_R1 = weight.float().reshape(layout.rows, -1).abs().amax(1, keepdim=True) / LARGEST
    # a row of zeros has any scale
    q_RI = (weight.reshape(layout.rows, -1).float() / scale_R1.where(scale_R1 > 0, 1)).round().clamp(-LARGEST, LARGEST)
    q = q_RI.to(torch.int8)[mask.reshape(layout.rows, -1)]
    return Compact(name, layout, found.bits, q, scale_R1[:, 0].contiguous())


def _bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


class CompactFolder:
    """An opened compact folder, with sizes, headers and the hashes of small files checked against compact.json. Tensors are
    lazy views of the files. Raises `UserError` if the folder is not compact or is damaged; `check_contents` also compares the
    hashes of the tensors' files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder} has no {MANIFEST}: write a compact folder with `python launch.py export`")
        about = files.read_json(folder / MANIFEST) or {}
        if about.pop("digest", None) != files.digest(about):
            raise UserError(f"{folder / MANIFEST} is damaged: its digest does not match")
        if about.get("format") != FORMAT or about.get("version") not in READS:
            found = f"{about.get('format')} {about.get('version')}"
            raise UserError(f"{folder} holds {found}, but this version reads {FORMAT} {READS[0]} to {READS[-1]}")
        try:
            self.names: list[str] = [str(name) for name in about["names"]]
            self.dtype: torch.dtype = getattr(torch, {name: name for name in DTYPES}[about["dtype"]])
            self.sha256 = {name: str(entry["sha256"]) for name, entry in about["files"].items()}
            sizes = {name: int(entry["bytes"]) for name, entry in about["files"].items()}
            self.layouts = {name: Layout.from_json(entry) for name, entry in about["matrices"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / MANIFEST} is invalid: {type(error).__name__}: {error}") from error
        for name, size in sizes.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{folder / MANIFEST} names {name}, which lies outside the folder")
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                state = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
                raise UserError(f"{path} {state} but should have {size}: fetch or export it again")
        self.shards = [folder / name for name in sorted(sizes) if Path(name).match(SHARDS)]
        self._check_hashes(name for name in sizes if not Path(name).match(SHARDS))  # small, such as config.json
        self.shapes: dict[str, tuple[int, ...]] = {}  # of parameters and buffers, by name in memory
        for path in self.shards:
            self._check_header(path)
        if missing := self.layouts.keys() - self.shapes.keys():
            raise UserError(f"{folder} lacks {min(missing)}, which {MANIFEST} lists ({len(missing)} missing)")

    def _check_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_slice(name) for name in file.keys()}
                found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
        except Exception as error:  # safetensors raises its own type
            raise UserError(f"{path} is damaged: {error}") from error
        for name, (dtype, shape) in found.items():
            parameter, _, part = name.partition("#")
            if layout := self.layouts.get(parameter):
                parts = layout.parts()
                known, size = parts.get(f"#{part}", ("", (0,)))
                fits = (dtype, len(shape)) == (known, 1) and shape[0] <= layout.weights and size[0] in (None, shape[0])
                if not fits or any(parameter + other not in found for other in parts):
                    raise UserError(f"{path}: {name} does not fit {MANIFEST}")
                if f"#{part}" != MASK:
                    continue
                shape = layout.shape
            elif part or parameter != name:
                raise UserError(f"{path}: {name} does not fit {MANIFEST}")
            if parameter in self.shapes:
                raise UserError(f"{path}: {parameter} is in two files")
            self.shapes[parameter] = shape

    def check_contents(self) -> None:
        """Raises `UserError` if the sha256 of a tensors' file differs from compact.json."""
        self._check_hashes(name for name in self.sha256 if Path(name).match(SHARDS))

    def _check_hashes(self, names: Iterable[str]) -> None:
        for name in names:
            if files.sha256(self.folder / name) != self.sha256[name]:
                raise UserError(f"{self.folder / name} is damaged (its sha256 differs): fetch or export it again")

    def read(self, shard: Path) -> Iterator[tuple[str, Tensor | Compact]]:
        """Yields name in memory of each parameter and buffer in a shard, and its tensor or compact matrix."""
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                parameter, _, part = name.partition("#")
                if not part:
                    yield name, file.get_tensor(name)
                elif f"#{part}" == MASK:
                    layout = self.layouts[parameter]
                    yield (
                        parameter,
                        Compact(parameter, layout, *(file.get_tensor(parameter + part) for part in layout.parts())),
                    )
