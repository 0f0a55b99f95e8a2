"""The Gram matrix of a matrix's inputs, X^T X, which SparseGPT calls the Hessian. Pure math, free of torch.distributed.

Shapes: I = in_features, N = tokens.
"""

import functools

import torch
from torch import Tensor

BANDS = 8  # of rows, in which the upper triangle is computed
NARROWEST = 128  # rows of a band: narrower products are slow


def packed(input_NI: Tensor) -> Tensor:
    """X^T X in fp32, its upper triangle packed into one row for `unpacked`: half the products, and half the numbers to sum
    over batches and ranks. A common factor (SparseGPT: 2/n) changes neither masks nor updates.

    On GPUs that can, 16-bit inputs are multiplied on tensor cores, whose products are exact and are summed in fp32."""
    in_16_bits = multiplies_16_bits(input_NI.device, input_NI.dtype)
    if not in_16_bits:
        input_NI = input_NI.float()
    inputs = input_NI.shape[1]
    triangle = input_NI.new_empty(packed_length(inputs), dtype=torch.float32)
    for first, rows, band in _views(triangle, inputs):
        left, right = input_NI[:, first : first + rows].T, input_NI[:, first:]
        if in_16_bits:
            torch.mm(left, right, out_dtype=torch.float32, out=band)
        else:
            torch.mm(left, right, out=band)
    return triangle


@functools.cache
def multiplies_16_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.mm` multiplies 16-bit inputs with fp32 results: on CUDA since torch 2.8. Tried once."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        inputs = torch.full((8, 16), 256.0, dtype=dtype, device=device)  # sums of 8 * 2^16, too large for fp16
        out = torch.empty(8, 16, dtype=torch.float32, device=device)
        torch.mm(inputs[:, :8].T, inputs, out_dtype=torch.float32, out=out)
        return bool((out == 2.0**19).all())
    except (NotImplementedError, RuntimeError, TypeError):
        return False


def packed_length(inputs: int) -> int:
    return sum(rows * columns for _, rows, columns in _bands(inputs))


def unpacked(triangle: Tensor, inputs: int) -> Tensor:
    """The Gram matrix, (I, I), in fp32."""
    gram_II = triangle.new_empty(inputs, inputs, dtype=torch.float32)
    for first, rows, band in _views(triangle, inputs):
        gram_II[first : first + rows, first:] = band
        gram_II[first + rows :, first : first + rows] = gram_II[first : first + rows, first + rows :].T
    return gram_II


def _views(triangle: Tensor, inputs: int) -> list[tuple[int, int, Tensor]]:
    """(first row, number of rows, their view from the diagonal on) of each band."""
    bands = _bands(inputs)
    parts = triangle.split([rows * columns for _, rows, columns in bands])
    return [(first, rows, part.view(rows, columns)) for part, (first, rows, columns) in zip(parts, bands)]


def _bands(inputs: int) -> list[tuple[int, int, int]]:
    """(first row, rows, columns) of at most `BANDS` bands: 9/16 of the matrix, in products large enough to be fast."""
    rows = max(NARROWEST, -(-inputs // BANDS))
    return [(first, min(rows, inputs - first), inputs - first) for first in range(0, inputs, rows)]
