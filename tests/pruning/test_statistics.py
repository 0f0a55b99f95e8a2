"""Sums over the inputs of a matrix: the forms for GPUs equal those for CPUs within rounding."""

import pytest
import torch

from pipeline.engine import observe
from pipeline.pruning import gram, scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_square_sums_without_a_temporary(dtype):
    inputs = (10 * torch.randn(300, 40)).to(dtype)
    expected = inputs.double().square().sum(0)
    for found in (scores.square_sum(inputs), scores.norm_square_sum(inputs)):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert scores.norm_square_sum(inputs[:0]).count_nonzero() == 0  # an expert without tokens
    # products of float16 overflow, their sums in float32 do not
    assert scores.norm_square_sum(torch.full((4, 2), 6e4, dtype=torch.float16)).isfinite().all()


def test_gram_matrices_on_tensor_cores(monkeypatch):
    """`torch.mm` multiplies 16-bit inputs with fp32 results on CUDA only: here it is given what it would compute."""
    assert not gram.multiplies_16_bits(torch.device("cpu"), torch.bfloat16)
    inputs, real, used = torch.randn(100, 300).bfloat16(), torch.mm, []

    def mm(left, right, out_dtype=None, out=None):
        used.append((left.dtype, out_dtype, out.dtype))
        return real(left.float(), right.float(), out=out)

    expected = gram.packed(inputs)
    monkeypatch.setattr(gram, "multiplies_16_bits", lambda device, dtype: True)
    monkeypatch.setattr(torch, "mm", mm)
    assert torch.equal(gram.packed(inputs), expected)
    assert set(used) == {(torch.bfloat16, torch.float32, torch.float32)}


def test_a_total_is_unpacked_in_float32_and_symmetric():
    inputs = torch.randn(50, 300)
    full = gram.unpacked(gram.packed(inputs).double(), 300)
    assert full.dtype == torch.float32 and torch.equal(full, full.T)
    torch.testing.assert_close(full, inputs.T @ inputs, rtol=1e-4, atol=1e-4)


def test_totals_are_summed_in_float64():
    total, part = torch.full((3, 5), 2.0**30, dtype=torch.float64), torch.full((3, 5), 0.25)
    observe._accumulate_(total, part)
    assert (total == 2.0**30 + 0.25).all()
