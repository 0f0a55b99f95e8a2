"""Triton kernels for a compact matrix on a GPU: times a few tokens, or made dense. Triton's interpreter runs them on a CPU.

Shapes: R = rows, I = columns, W = ceil(I / 32), N = tokens. Memory of a matrix: `words` (R, W) int32, the mask, lowest bit
first; `bases` (R, W) int16, read as unsigned, the number of the row's values before each word; `offsets` (R + 1,) int64, the
start of each row in `values` (kept + 1,), of the inputs' dtype, or int8 with `scales` (R,) float32.

A thread takes a byte of the mask (8 columns) in several rows. So the lanes of a warp read neighbouring values of a row, and a
thread's inputs serve all of its rows. `bases` tell where a byte's values start, so no thread waits for another. In a byte, the
pointer advances with each set bit. Values are loaded before their bit is looked at, without a predicate; that reads one value
past the last one, hence kept + 1. The caller must have checked that mask, offsets and values fit each other.

The compiler chooses which lanes take what: it puts them along the dimension in which addresses are contiguous. Here there is
none, so hints (`max_contiguous`, `multiple_of`) claim that pairs along B are contiguous, but not aligned: this decides the
order and permits no vector loads. A hint must stand where the pointers are computed; tests/compact/compile_kernels.py shows
its effect.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

FEW = 16  # tokens that `product` takes at a time: the height of a tile of tensor cores
PROGRAMS = 512  # wanted at least: four for each of an H100's 132 multiprocessors


@triton.jit
def _ones(word):
    """The number of set bits of an int32; the compiler knows the idiom (POPC)."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF


@triton.jit
def _load_bytes(words, bases, row_R, byte_B, rows, width):
    """Bytes of the mask, and the place in its row of each byte's first value, both (R, B) int32; 0 outside of the matrix."""
    here = (row_R < rows)[:, None] & (byte_B < width * 4)[None, :]
    at = row_R.to(tl.int64)[:, None] * width + (byte_B // 4)[None, :]
    words_RB = tl.max_contiguous(tl.multiple_of(words + at, (1, 1)), (1, 2))
    bases_RB = tl.max_contiguous(tl.multiple_of(bases + at, (1, 1)), (1, 2))
    word = tl.load(words_RB, mask=here, other=0)
    base = tl.load(bases_RB, mask=here, other=0).to(tl.int32) & 0xFFFF
    shift = ((byte_B % 4) * 8)[None, :]
    return (word >> shift) & 0xFF, base + _ones(word & ((1 << shift) - 1))


@triton.jit
def _product_kernel(
    x, words, bases, offsets, values, scales, bias, out, rows, columns, width,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program: one token of `x` (N, I), R rows, B bytes at a time."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    x += tl.program_id(1) * columns
    out += tl.program_id(1) * rows
    byte_B = tl.arange(0, B)
    start_R = tl.load(offsets + row_R, mask=row_R < rows, other=0)
    sums_RB = tl.zeros((R, B), tl.float32)
    bits, place = _load_bytes(words, bases, row_R, byte_B, rows, width)
    for chunk in range(CHUNKS):
        first = chunk * B
        # the next bytes, while this chunk's values are on their way
        next_bits, next_place = _load_bytes(words, bases, row_R, first + B + byte_B, rows, width)
        at = tl.max_contiguous(tl.multiple_of((values + start_R)[:, None] + place, (1, 1)), (1, 2))
        for bit in tl.static_range(8):
            column_1B = ((first + byte_B) * 8 + bit)[None, :]
            inputs_1B = tl.max_contiguous(tl.multiple_of(x + column_1B, (1, 1)), (1, 2))
            x_1B = tl.load(inputs_1B, mask=column_1B < columns, other=0).to(tl.float32)
            kept = (bits & (1 << bit)) != 0
            sums_RB = tl.where(kept, sums_RB + tl.load(at).to(tl.float32) * x_1B, sums_RB)
            at = tl.max_contiguous(tl.multiple_of(tl.where(kept, at + 1, at), (1, 1)), (1, 2))
        bits, place = next_bits, next_place
    sum_R = tl.sum(sums_RB, 1)
    if HAS_SCALES:
        sum_R *= tl.load(scales + row_R, mask=row_R < rows, other=0)
    if HAS_BIAS:
        sum_R += tl.load(bias + row_R, mask=row_R < rows, other=0).to(tl.float32)
    tl.store(out + row_R, sum_R.to(out.dtype.element_ty), mask=row_R < rows)


@triton.jit(do_not_specialize=["tokens"])
def _products_kernel(
    x, words, bases, offsets, values, scales, bias, out, rows, tokens, width,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, CHUNKS: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """At most N tokens, on tensor cores, in 16 bits. `x` (tokens, 8, 4 W): the inputs of bit 0 of each byte, of bit 1, ..."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    byte_B, token_N = tl.arange(0, B), tl.arange(0, N)
    start_R = tl.load(offsets + row_R, mask=row_R < rows, other=0)
    sums_NR = tl.zeros((N, R), tl.float32)
    bits, place = _load_bytes(words, bases, row_R, byte_B, rows, width)
    for chunk in range(CHUNKS):
        first = chunk * B
        next_bits, next_place = _load_bytes(words, bases, row_R, first + B + byte_B, rows, width)
        at = tl.max_contiguous(tl.multiple_of((values + start_R)[:, None] + place, (1, 1)), (1, 2))
        here = (token_N < tokens)[:, None] & (first + byte_B < width * 4)[None, :]
        for bit in tl.static_range(8):
            inputs_NB = x + ((token_N * 8 + bit) * (width * 4))[:, None] + (first + byte_B)[None, :]
            x_NB = tl.load(inputs_NB, mask=here, other=0)
            kept = (bits & (1 << bit)) != 0
            weight_RB = tl.where(kept, tl.load(at), 0).to(x.dtype.element_ty)
            sums_NR = tl.dot(x_NB, tl.trans(weight_RB), sums_NR, input_precision="ieee")
            at = tl.max_contiguous(tl.multiple_of(tl.where(kept, at + 1, at), (1, 1)), (1, 2))
        bits, place = next_bits, next_place
    if HAS_SCALES:
        sums_NR *= tl.load(scales + row_R, mask=row_R < rows, other=0)[None, :]
    if HAS_BIAS:
        sums_NR += tl.load(bias + row_R, mask=row_R < rows, other=0).to(tl.float32)[None, :]
    here = (token_N < tokens)[:, None] & (row_R < rows)[None, :]
    tl.store(out + token_N[:, None] * rows + row_R[None, :], sums_NR.to(out.dtype.element_ty), mask=here)


@triton.jit
def _expand_kernel(
    words, bases, offsets, values, scales, out, rows, columns, width,
    HAS_SCALES: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A program writes R rows of 8 B columns."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    byte_B = tl.program_id(1) * B + tl.arange(0, B)
    bit_8 = tl.arange(0, 8)[None, None, :]
    bits, place = _load_bytes(words, bases, row_R, byte_B, rows, width)
    bits, place = bits[:, :, None], place[:, :, None]
    start_R = tl.load(offsets + row_R, mask=row_R < rows, other=0)[:, None, None]
    kept = ((bits >> bit_8) & 1) != 0
    value = tl.load(values + start_R + (place + _ones(bits & ((1 << bit_8) - 1))), mask=kept, other=0)
    if HAS_SCALES:
        value = value.to(tl.float32) * tl.load(scales + row_R, mask=row_R < rows, other=0)[:, None, None]
    column_1B8 = byte_B[None, :, None] * 8 + bit_8
    here = (row_R < rows)[:, None, None] & (column_1B8 < columns)
    to = out + (row_R.to(tl.int64)[:, None, None] * columns + column_1B8)
    tl.store(to, value.to(out.dtype.element_ty), mask=here)


def product(
    words: Tensor,
    bases: Tensor,
    offsets: Tensor,
    values: Tensor,
    scales: Tensor | None,
    x_NI: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """x W^T + bias, (N, R), of x's dtype, for at most `FEW` tokens; sums in float32."""
    (tokens, columns), (rows, width) = x_NI.shape, words.shape
    out = x_NI.new_empty(tokens, rows)
    constants = {"HAS_SCALES": scales is not None, "HAS_BIAS": bias is not None}
    # a pointer that is not used must be one all the same
    matrix = (words, bases, offsets, values, offsets if scales is None else scales, out if bias is None else bias, out)
    # Triton's interpreter multiplies no bf16
    on_tensor_cores = tokens > 1 and x_NI.dtype in (
        (torch.float16, torch.bfloat16) if x_NI.is_cuda else (torch.float16,)
    )
    height, chunk, warps = (few_tokens if on_tensor_cores else one_token)(rows, width)
    grid = (triton.cdiv(rows, height), 1 if on_tensor_cores else tokens)
    constants |= {"R": height, "B": chunk, "CHUNKS": triton.cdiv(width * 4, chunk), "num_warps": warps}
    with torch.cuda.device_of(values):
        if on_tensor_cores:
            x = F.pad(x_NI, (0, width * 32 - columns)).reshape(tokens, -1, 8).transpose(1, 2).contiguous()
            _products_kernel[grid](x, *matrix, rows, tokens, width, **constants, N=FEW, num_stages=2)
        else:
            _product_kernel[grid](x_NI.contiguous(), *matrix, rows, columns, width, **constants)
    return out


def expand(words: Tensor, bases: Tensor, offsets: Tensor, values: Tensor, scales: Tensor | None, out: Tensor) -> Tensor:
    """Writes the dense matrix to `out` (R, I), contiguous, and returns it."""
    (rows, columns), width = out.shape, words.shape[1]
    height, chunk = 4, 64
    grid = (triton.cdiv(rows, height), triton.cdiv(width * 4, chunk))
    matrix = (words, bases, offsets, values, offsets if scales is None else scales, out)
    constants = {"HAS_SCALES": scales is not None, "R": height, "B": chunk, "num_warps": 4}
    with torch.cuda.device_of(values):
        _expand_kernel[grid](*matrix, rows, columns, width, **constants)
    return out


def one_token(rows: int, width: int) -> tuple[int, int, int]:
    """Rows and bytes of a program's tile, and its warps: a byte for each thread; eight rows, if there are enough programs."""
    warps = min(8, max(1, triton.next_power_of_2(width * 4) // 32))
    height = 8
    while height > 1 and rows // height < PROGRAMS:
        height //= 2
    return height, 32 * warps, warps


def few_tokens(rows: int, width: int) -> tuple[int, int, int]:
    """The same. Eight rows are a tensor core's least, 16 bytes its depth."""
    return 8, min(128, max(16, triton.next_power_of_2(width * 4))), 4
