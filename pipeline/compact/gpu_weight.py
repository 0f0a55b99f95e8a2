"""A compact matrix in use on a GPU: Triton kernels multiply it with a few tokens, and expand it for many.

Without Triton, or where it does not compile, torch's own operations expand the matrix for every product.
Shapes as in kernels_triton.py: R = rows, I = columns, W = ceil(I / 32), N = tokens.
"""

import warnings
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.compact.compact_weight import FEW, OFFSET, CompactWeight
from pipeline.runtime.triton_kernels import TritonKernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of inputs that the kernels support
HALVES = DTYPES[:2]  # of matrices that torch's semi-structured tensors support
WIDEST = 1 << 16  # columns: `bases` has 16 bits
# of a product, relative to its largest number
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}


class GpuWeight(CompactWeight):
    """`mask` (R, W) is int32 here, `values` (kept + 1,) of `dtype` or int8. `bases` (R, W) int16: as in kernels_triton.py."""

    bases: Tensor

    @classmethod
    def from_cpu(cls, weight: CompactWeight, device: torch.device) -> "GpuWeight":
        """Copies a checked matrix to the device."""
        spare = -weight.mask.shape[1] % 4
        words = np.pad(weight.mask.numpy(), ((0, 0), (0, spare))).view(np.int32)
        counts = np.bitwise_count(words.view(np.uint32))
        before = np.cumsum(counts, axis=1, dtype=np.uint16) - counts
        kept = weight.values if weight.scales is None else (weight.values ^ OFFSET).view(torch.int8)
        values = torch.zeros(len(kept) + 1, dtype=kept.dtype, device=device)
        values[:-1].copy_(kept)
        scales = None if weight.scales is None else weight.scales.to(device)
        found = cls(
            torch.from_numpy(words).to(device),
            values,
            scales,
            weight.offsets.to(device),
            weight.columns,
            weight.dtype,
            weight.transposed,
            weight.experts,
        )
        found.bases = torch.from_numpy(before.view(np.int16)).to(device)
        return found

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.bases.nbytes

    def _part(self, start: int, stop: int) -> "GpuWeight":
        part = super()._part(start, stop)
        part.bases = self.bases[start:stop]
        return part

    def _kernels(self) -> ModuleType | None:
        return KERNELS.load(self.device) if self.dtype in DTYPES and self.columns < WIDEST else None

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x_NI = x.reshape(-1, self.columns)
        if 0 < len(x_NI) <= FEW and (kernels := self._kernels()) is not None:
            out_NR = kernels.product(self.mask, self.bases, self.offsets, self.values, self.scales, x_NI, bias)
        else:
            out_NR = F.linear(x_NI, self.matrix(), bias)
        return out_NR.view(*x.shape[:-1], self.rows)

    def matrix(self) -> Tensor:
        out = torch.empty(self.rows, self.columns, dtype=self.dtype, device=self.device)
        if (kernels := self._kernels()) is not None:
            return kernels.expand(self.mask, self.bases, self.offsets, self.values, self.scales, out)
        return expand_by_torch(self, out)

    def is_2_of_4(self) -> bool:
        """Whether no four columns keep more than two weights."""
        pairs = self.mask - ((self.mask >> 1) & 0x55555555)
        fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)  # each four bits: the number of ones in them
        return not ((fours + 0x55555555) & -0x77777778).any()  # adding 5 sets the highest of four bits from 3 on


def expand_by_torch(weight: GpuWeight, out: Tensor) -> Tensor:
    """Writes the dense rows of `weight` to `out` (R, I) and returns it."""
    bytes_R = weight.mask.view(torch.uint8).unsqueeze(-1)
    bit_8 = torch.arange(8, dtype=torch.uint8, device=weight.device)
    kept_RI = ((bytes_R >> bit_8) & 1).bool().flatten(1)[:, : weight.columns]
    values = weight.values[int(weight.offsets[0]) :]
    if weight.scales is None:
        return out.zero_().masked_scatter_(kept_RI, values)
    scaled_RI = torch.zeros(out.shape, device=out.device).masked_scatter_(kept_RI, values.float())
    return out.copy_(scaled_RI.mul_(weight.scales[:, None]))


def _imported() -> ModuleType:
    from pipeline.compact import kernels_triton  # imports triton

    return kernels_triton


def _check(kernels: ModuleType, device: torch.device) -> None:
    """Compares the kernels with torch's operations on a small matrix. Raises `RuntimeError` if they differ."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 24, 104
    mask_RI = torch.rand(rows, columns, generator=generator) < 0.5
    offsets = F.pad(mask_RI.sum(1).cumsum(0), (1, 0))
    values = torch.randn(int(offsets[-1]), generator=generator).bfloat16()
    packed = torch.from_numpy(np.packbits(mask_RI.numpy(), axis=1, bitorder="little"))
    weight = GpuWeight.from_cpu(CompactWeight(packed, values, None, offsets, columns, values.dtype, False), device)
    dense = expand_by_torch(weight, torch.empty(rows, columns, dtype=weight.dtype, device=device))
    parts = (weight.mask, weight.bases, weight.offsets, weight.values, None)
    if not torch.equal(kernels.expand(*parts, torch.empty_like(dense)), dense):
        raise RuntimeError("a matrix that they expanded is wrong")
    for tokens in (1, 5):
        x = torch.randn(tokens, columns, generator=generator).bfloat16().to(device)
        if error_of(kernels.product(*parts, x, None), F.linear(x.double(), dense.double())) > TOLERANCE[dense.dtype]:
            raise RuntimeError("a product that they computed is wrong")


def error_of(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number expected. NaN counts as infinite."""
    error = ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


KERNELS = TritonKernels(_imported, _check, "compact matrices", "expanding each matrix that is used")


class SemiStructuredWeight(CompactWeight):
    """A 2:4 matrix (R, I) of a 16-bit dtype as torch's semi-structured tensor, for sparse tensor cores."""

    def __init__(self, dense: Tensor, transposed: bool) -> None:
        """`dense` (R, I), contiguous. Raises torch's error if its shape or the GPU is not supported."""
        self.columns, self.dtype, self.transposed, self.experts = dense.shape[1], dense.dtype, transposed, 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the API is a prototype
            sparse, has_library = torch.sparse, torch.backends.cusparselt.is_available()
            kind = (
                sparse.SparseSemiStructuredTensorCUSPARSELT if has_library else sparse.SparseSemiStructuredTensorCUTLASS
            )
            self.packed = kind.from_dense(dense)
            self._linear(dense.new_zeros(1, self.columns), None)  # some GPUs can compress but not multiply

    @property
    def rows(self) -> int:
        return self.packed.shape[0]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.packed.packed, self.packed.meta) if part is not None)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out_NR = F.linear(x.reshape(-1, self.columns).contiguous(), self.packed)
        return (out_NR if bias is None else out_NR + bias).reshape(*x.shape[:-1], self.rows)

    def matrix(self) -> Tensor:
        return self.packed.to_dense()
