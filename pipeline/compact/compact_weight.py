"""A compact matrix in use on the CPU. Without kernels, it is made dense for each product. On a GPU: gpu_weight.py.

Shapes: E = experts, O = out_features, I = in_features, N = tokens.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from pipeline.compact import kernels
from pipeline.compact.file_format import INTEGERS, Compact
from pipeline.runtime.errors import UserError

FEW = 16  # tokens up to which reading compact rows is faster than expanding them for torch's product
OFFSET = 128  # of int8 values in memory: the kernels multiply unsigned bytes
MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)  # not __rmatmul__, whose first argument is the right factor
OF_TENSORS = {"data", "grad", "requires_grad"}  # what is set on a weight to change it or to train it


class CompactWeight:
    """Stands in for a weight (O, I) or (E, O, I), or their transposes. `F.linear(x, weight)`, `x @ weight.T` and one expert's
    `weight[e]` stay compact; every other operation sees the dense weight. That is a copy, so what would change a weight in
    place raises `UserError`."""

    _is_hf_initialized = True

    def __init__(
        self,
        mask: Tensor,
        values: Tensor,
        scales: Tensor | None,
        offsets: Tensor,
        columns: int,
        dtype: torch.dtype,
        transposed: bool,
        experts: int = 0,
    ):
        """`mask` (rows, ceil(I / 8)) uint8, lowest bit first; `values` (kept,) of `dtype`, or uint8, the int8 value + 128, with
        `scales` (rows,) float32; `offsets` (rows + 1,) int64, the start of each row in `values`. rows = O, or E * O with
        `experts`."""
        self.mask, self.values, self.scales, self.offsets = mask, values, scales, offsets
        self.columns, self.dtype, self.transposed, self.experts = columns, dtype, transposed, experts

    @classmethod
    def from_compact(
        cls, compact: Compact, dtype: torch.dtype, memory: Callable[[Tensor], Tensor] = torch.clone
    ) -> "CompactWeight":
        """`memory` copies a tensor to where it stays. Raises `UserError` unless the mask has as many bits as values, since
        kernels read unchecked."""
        *experts, _, columns = compact.layout.shape_OI
        bits = compact.bits.numpy()
        if columns % 8:
            rows = np.unpackbits(bits, count=compact.layout.weights, bitorder="little").reshape(-1, columns)
            mask = np.packbits(rows, axis=1, bitorder="little")
        else:
            mask = bits.reshape(-1, columns // 8)
        wide = mask.view(np.uint64) if mask.shape[1] % 8 == 0 else mask
        offsets = np.zeros(len(mask) + 1, dtype=np.int64)
        np.cumsum(np.bitwise_count(wide).sum(1, dtype=np.int64), out=offsets[1:])
        if offsets[-1] != len(compact.values):
            raise UserError(
                f"{compact.name} is damaged: its mask keeps {offsets[-1]} weights, but there are {len(compact.values)}"
            )
        values = compact.values.to(dtype) if compact.scales is None else compact.values.view(torch.uint8) ^ OFFSET
        values, mask = memory(values), memory(torch.from_numpy(mask))
        scales = None if compact.scales is None else compact.scales.clone()
        return cls(mask, values, scales, torch.from_numpy(offsets), columns, dtype, compact.layout.transposed, *experts)

    @property
    def rows(self) -> int:
        """Of all experts."""
        return len(self.mask)

    @property
    def shape(self) -> torch.Size:
        matrix = (self.rows // max(1, self.experts), self.columns)
        return torch.Size((*([self.experts] if self.experts else []), *(matrix[::-1] if self.transposed else matrix)))

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        parts = (self.mask, self.values, self.scales, self.offsets)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def T(self) -> Any:
        if self.experts:
            return self.dense().T
        other = copy.copy(self)
        other.transposed = not self.transposed
        return other

    def t(self) -> Any:
        return self.T

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """One expert's matrix, compact; any other index works on the dense weight."""
        is_single_index = isinstance(index, int) or (
            isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool
        )
        if not self.experts or not is_single_index:
            return self.dense()[index]
        expert, rows = range(self.experts)[int(index)], self.rows // self.experts
        return self._part(expert * rows, (expert + 1) * rows)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.refuse_change()

    def _part(self, start: int, stop: int) -> "CompactWeight":
        """Rows start to stop as a matrix of their own, in the same memory."""
        part = copy.copy(self)
        part.mask, part.offsets, part.experts = self.mask[start:stop], self.offsets[start : stop + 1], 0
        part.scales = None if self.scales is None else self.scales[start:stop]
        return part

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "data" or name.endswith("_"):  # peft merges an adapter by `weight.data += delta`
            self.refuse_change()
        return getattr(self.dense(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_TENSORS:
            self.refuse_change()
        super().__setattr__(name, value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        x, weight, bias = (*args, None, None, None)[:3]
        if isinstance(x, Tensor) and isinstance(weight, cls) and not weight.experts:
            if func is F.linear and not weight.transposed:
                return weight.linear(x, kwargs.get("bias") if bias is None else bias)
            if func in MATMULS and weight.transposed:
                return weight.linear(x)
        name, first = getattr(func, "__name__", ""), next(iter([*args, *kwargs.values()]))
        in_place = name.endswith("_") and not name.endswith("__")
        if isinstance(first if in_place else kwargs.get("out"), cls):
            cls.refuse_change()
        args, kwargs = tree_map(lambda value: value.dense() if isinstance(value, cls) else value, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def refuse_change() -> None:
        raise UserError(
            "a compact weight cannot be changed, nor an adapter merged into it: make the model dense with "
            "`python launch.py expand`"
        )

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., I) W^T + bias, (..., O), for one matrix, however it is stored."""
        dtype, grad = self.dtype, torch.is_grad_enabled()
        needs_grad = grad and (x.requires_grad or (bias is not None and bias.requires_grad))
        same = x.dtype is dtype and x.shape[-1] == self.columns and (bias is None or bias.dtype is dtype)
        if not same or needs_grad or x.device != self.device or torch.is_autocast_enabled(self.device.type):
            return F.linear(x, self.matrix(), bias)
        return self._linear(x, bias)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`linear` without gradients, for an `x` of this device and dtype."""
        if self.dtype not in kernels.DTYPES or (operators := kernels.load()) is None:
            return F.linear(x, self.matrix(), bias)
        parts = (self.mask, self.values, self.scales, self.offsets)
        if x.numel() <= FEW * self.columns:
            return operators.product.default(*parts, x, bias)
        return operators.prefill.default(*parts, x.reshape(-1, self.columns), bias).view(*x.shape[:-1], self.rows)

    def dense(self) -> Tensor:
        """The dense weight as the model stores it."""
        dense = self.matrix()
        dense = dense.view(self.experts, -1, self.columns) if self.experts else dense
        return dense.transpose(-1, -2) if self.transposed else dense

    def matrix(self) -> Tensor:
        """The dense (rows, I) matrix, of all experts."""
        out = torch.empty(self.rows, self.columns, dtype=self.dtype)
        if self.dtype in kernels.DTYPES and (operators := kernels.load()) is not None:
            operators.expand.default(self.mask, self.values, self.scales, self.offsets, out)
            return out
        kept = np.unpackbits(self.mask.numpy(), axis=1, count=self.columns, bitorder="little").view(bool)
        # of one expert, `values` holds those of all
        values, words = self.values[int(self.offsets[0]) : int(self.offsets[-1])], INTEGERS[self.dtype.itemsize]
        if self.scales is not None:
            values = ((values.float() - OFFSET) * self.scales.repeat_interleave(self.offsets.diff())).to(self.dtype)
        out.zero_().view(words).numpy()[kept] = values.view(words).numpy()
        return out


def _of_dense(name: str) -> Callable[..., Any]:
    """An operator, which Python looks up in the class and not by `__getattr__`."""

    def call(weight: CompactWeight, *others: Any) -> Any:
        return getattr(weight.dense(), name)(*others)

    return call


for _name in ("neg", "abs", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "matmul"):
    setattr(CompactWeight, f"__{_name}__", _of_dense(f"__{_name}__"))
