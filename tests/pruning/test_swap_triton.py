"""The kernel of exchanges gives what the loop in torch gives: under Triton's interpreter, or compiled on a GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.pruning import swap
from pipeline.pruning.refinements import group_of
from pipeline.runtime import code
from pipeline.sparsity.patterns import parse
from tests.conftest import compiled_for_gpus

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton")
swap_triton = pytest.importorskip("pipeline.pruning.swap_triton", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def matrix(rows: int, inputs: int, sparsity: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense weights, updated weights, a mask and the Gram matrix of correlated inputs, some of them dead, on `DEVICE`."""
    generator = torch.Generator().manual_seed(0)
    input_NI = torch.randn(2 * inputs, inputs, generator=generator)
    input_NI += input_NI.roll(1, 1) + input_NI[:, :1]
    input_NI[:, ::13] = 0
    dense_RI = torch.randn(rows, inputs, generator=generator)
    mask_RI = parse(sparsity).select(dense_RI.abs())
    updated_RI = (dense_RI + torch.randn(rows, inputs, generator=generator) / 10) * mask_RI
    input_NI = input_NI.to(DEVICE)  # on a CPU the product for 11,008 inputs takes a minute
    return dense_RI.to(DEVICE), updated_RI.to(DEVICE), mask_RI.to(DEVICE), input_NI.T @ input_NI


def error(dense_RI: Tensor, weight_RI: Tensor, gram_II: Tensor) -> Tensor:
    difference_RI = (dense_RI - weight_RI).double()
    return (difference_RI @ gram_II.double() * difference_RI).sum(1)


@pytest.mark.parametrize(
    "sparsity, rows, inputs", [("2of4", 5, 56), ("4of8", 3, 40), ("1of2", 3, 32), ("0.5", 4, 56), ("0.7", 3, 10)]
)
def test_the_kernel_agrees_with_torch(monkeypatch, sparsity, rows, inputs):
    """Inputs that do not fill the last chunk, dead inputs, a refreshed product, rows that are done early."""
    monkeypatch.setattr(swap_triton, "CHUNK", 32)
    monkeypatch.setattr(swap, "REFRESH", 3)
    given, group = matrix(rows, inputs, sparsity), group_of(parse(sparsity))
    expected = swap.swap(*(tensor.cpu() for tensor in given), group, 8)
    found = swap.swap(*given, group, 8, swap_triton.exchange)
    assert torch.equal(found.cpu(), expected) and not torch.equal(found, given[2])


@pytest.mark.parametrize("sparsity", ["2of4", "0.5"])
def test_exchanges_end_where_none_helps(monkeypatch, sparsity):
    monkeypatch.setattr(swap, "REFRESH", 4)
    dense_RI, _, mask_RI, gram_II = matrix(2, 16, sparsity)
    found, expected = (
        swap.swap(dense_RI, dense_RI, mask_RI, gram_II, group_of(parse(sparsity)), 1000, exchange)
        for exchange in (swap_triton.exchange, swap.exchange_by_torch)
    )
    assert torch.equal(found, expected)
    assert (error(dense_RI, dense_RI * found, gram_II) < error(dense_RI, dense_RI * mask_RI, gram_II)).all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernels, sparsity, inputs", [(swap.IN_GROUPS, "2of4", 5504), (swap.IN_ROWS, "0.5", 11008)])
def test_the_kernel_is_used_on_a_gpu_and_agrees_on_large_matrices(kernels, sparsity, inputs):
    assert kernels.on_gpu(torch.device("cuda")) is swap_triton
    dense_RI, weight_RI, mask_RI, gram_II = matrix(512, inputs, sparsity)
    group = group_of(parse(sparsity))
    before = error(dense_RI, weight_RI * mask_RI, gram_II)
    errors = []
    for exchange in (swap.exchange_by_torch, swap_triton.exchange):
        masks = swap.swap(dense_RI, weight_RI, mask_RI, gram_II, group, 100, exchange)
        kept, kept_before = (mask.unflatten(1, (-1, group or inputs)).sum(2) for mask in (masks, mask_RI))
        assert torch.equal(kept, kept_before)
        errors.append(error(dense_RI, torch.where(mask_RI, weight_RI, dense_RI) * masks, gram_II))
    assert (errors[1] <= before).all()
    torch.testing.assert_close(errors[1].sum(), errors[0].sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kernels", [swap.IN_GROUPS, swap.IN_ROWS])
def test_it_is_checked_before_it_is_used(monkeypatch, kernels):
    monkeypatch.setattr(swap, "REFRESH", 2)
    for module in (swap, swap_triton):
        monkeypatch.setattr(module, "CANDIDATES", 4)  # Triton's interpreter takes a second for each exchange of 16
    kernels.check(swap_triton, DEVICE)
    with pytest.raises(RuntimeError, match="a mask that they refined is wrong"):
        kernels.check(SimpleNamespace(exchange=lambda *state: None), DEVICE)
    assert kernels.on_gpu(torch.device("cpu")) is None


def test_it_counts_as_code_of_the_refinements():
    """Else a stage would not run again after the kernel is edited."""
    assert Path(swap_triton.__file__) in code.used("pipeline.pruning.refinements")


def test_the_kernel_compiles_for_gpus():
    """Little is spilled to the stack, most of it for rows of 16,384 inputs. No GPU is needed for this."""
    rows = compiled_for_gpus("tests.pruning.compile_swap")
    assert len(rows) == 12 and all(int(row.split()[-1]) <= 256 for row in rows), rows
