"""The effective weights of a masked LoRA, M * (W + scale * B A), and masks on gradients and trained weights: by Triton kernels
on a GPU, by torch elsewhere.

Shapes: E = experts (absent if the parameter is one matrix), P, Q = rows and columns of the stored weight, R = rank.
"""

from types import ModuleType

import torch
from torch import Tensor

from pipeline.runtime.triton_kernels import TritonKernels
from pipeline.sparsity.masks import apply_, multiply_, nonzero_pruned
from pipeline.sparsity.packed import pack, unpack


@torch.no_grad()
def effective(
    base: Tensor | None, left: Tensor, right: Tensor, mask_bits: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """M * (base + scale * left @ right), (E, P, Q), in the dtype of `base`, and how many of its pruned weights are not zero,
    because the sum is not finite there. `base` (E, P, Q), None: zeros of the dtype of `left`; `left` (E, P, R), `right`
    (E, R, Q); `mask_bits`: the mask of the result, packed. Kernels compute the sum in float32, torch in the dtype of `left`."""
    if kernels := _kernels_for(left if base is None else base, mask_bits, strided=True):
        return kernels.effective(base, left, right, mask_bits, scale)
    return effective_by_torch(base, left, right, mask_bits, scale)


def effective_by_torch(
    base: Tensor | None, left: Tensor, right: Tensor, mask_bits: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    with torch.autocast(left.device.type, enabled=False):
        if base is None:
            summed = scale * (left @ right)
        else:
            add = torch.baddbmm if base.dim() == 3 else torch.addmm
            summed = add(base.to(left.dtype), left, right, alpha=scale).to(base.dtype)
    return summed, _mask_by_torch_(summed, mask_bits)


@torch.no_grad()
def mask_gradient_(gradient: Tensor, mask: Tensor) -> Tensor:
    """Multiplies a gradient by its mask, bool or packed, in place; returns it."""
    if kernels := _kernels_for(gradient, mask):
        kernels.mask_(gradient, mask)
        return gradient
    return multiply_(gradient, _unpacked(mask, gradient))


@torch.no_grad()
def mask_weight_(weight: Tensor, mask: Tensor) -> Tensor:
    """Zeroes the pruned weights, in place; returns how many are not zero then, because they were not finite."""
    if kernels := _kernels_for(weight, mask):
        return kernels.mask_(weight, mask)
    return _mask_by_torch_(weight, mask)


def _mask_by_torch_(weight: Tensor, mask: Tensor) -> Tensor:
    mask = _unpacked(mask, weight)
    return nonzero_pruned(apply_(weight, mask), mask).count_nonzero()


def _unpacked(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else unpack(mask, tensor.shape)


def _kernels_for(tensor: Tensor, mask: Tensor, strided: bool = False) -> ModuleType | None:
    supported = mask.dtype != torch.bool and tensor.dtype.itemsize <= 4 and (strided or tensor.is_contiguous())
    return KERNELS.on_gpu(tensor.device) if supported else None


def _imported() -> ModuleType:
    from pipeline.recovery import effective_triton  # imports triton

    return effective_triton


def check_kernels(kernels: ModuleType, device: torch.device) -> None:
    """Compares the kernels with torch on a small matrix. Raises `RuntimeError` if they differ."""
    generator = torch.Generator().manual_seed(0)
    base, left, right = (torch.randn(shape, generator=generator) for shape in ((40, 72), (40, 8), (8, 72)))
    mask = torch.rand(40, 72, generator=generator) < 0.5
    mask[3, 4], base[3, 4] = False, torch.inf
    given = (base.to(torch.bfloat16), left, right, pack(mask))
    expected, _ = effective_by_torch(*given, 0.5)
    found, wrong = kernels.effective(*(tensor.to(device) for tensor in given), 0.5)
    if not torch.allclose(found.cpu().float(), expected.float(), 2e-2, 1e-2, equal_nan=True) or wrong != 1:
        raise RuntimeError("an effective weight that they computed is wrong")
    masked = base.to(device, copy=True)
    wrong = kernels.mask_(masked, given[-1].to(device))
    if wrong != 1 or not torch.allclose(masked.cpu(), mask_gradient_(base, given[-1]), 0, 0, equal_nan=True):
        raise RuntimeError("a tensor that they masked is wrong")


KERNELS = TritonKernels(_imported, check_kernels, "masked weights", "masking takes a dozen passes over each weight")
