"""The kernels of the masked LoRA give what torch gives: under Triton's interpreter, or compiled on a GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.recovery import effective, lora
from pipeline.recovery.methods import SparseFull
from pipeline.runtime import code
from pipeline.settings.schema import Finetune
from pipeline.sparsity.packed import pack, unpack
from tests.conftest import compiled_for_gpus
from tests.engine.test_decoder import small_model
from tests.recovery.test_lora import with_masks

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton")
effective_triton = pytest.importorskip("pipeline.recovery.effective_triton", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 16, 20])
@pytest.mark.parametrize("form", ["matrix", "Conv1D", "experts", "transposed experts", "no base"])
def test_the_kernel_agrees_with_torch(form, rank, dtype):
    """Tiles that are not full, transposed weights and adapters, zeros that are negative."""
    torch.manual_seed(0)
    experts, rows, columns = (3,) if "experts" in form else (), 37, 140
    left, right = torch.randn(*experts, rows, rank), torch.randn(*experts, rank, columns)
    base = torch.randn(*experts, rows, columns, dtype=dtype)
    base[..., ::5] = -0.0
    if form == "Conv1D":
        base = base.T.contiguous().T
    if form == "transposed experts":
        left, right = left.mT.contiguous().mT, right.mT.contiguous().mT
    given = [tensor.to(DEVICE) for tensor in (base, left, right, pack(torch.rand(base.shape) < 0.5))]
    given[0] = None if form == "no base" else given[0]
    expected, none = effective.effective_by_torch(*given, 0.5)
    found, wrong = effective_triton.effective(*given, 0.5)
    assert found.dtype == expected.dtype and found.is_contiguous() and wrong == none == 0
    rounding = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=rounding, atol=1e-5)
    assert torch.equal(found == 0, expected == 0) and not found[found == 0].signbit().any()


def test_pruned_weights_that_are_not_finite_are_counted():
    base = torch.randn(40, 200, dtype=torch.float16)
    mask = torch.ones(40, 200, dtype=torch.bool)
    mask[:, ::2] = False
    left, right = torch.zeros(40, 16), torch.zeros(16, 200)
    base[3, 4], base[33, 6], base[3, 5] = torch.inf, torch.nan, torch.nan  # the last one is kept
    left[9, 0], right[0, 7:11] = 1e5, 1.0  # overflows float16 in two pruned and two kept weights
    given = [tensor.to(DEVICE) for tensor in (base, left, right, pack(mask))]
    for compute in (effective_triton.effective, effective.effective_by_torch):
        found, wrong = compute(*given, 1.0)
        assert wrong == 4 and found[3, 4].isnan() and found[9, 7].isinf() and found[3, 5].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 140), (2, 64, 33)])
def test_tensors_are_masked_in_place(shape, dtype):
    torch.manual_seed(0)
    tensor, mask = torch.randn(shape, dtype=dtype, device=DEVICE), torch.rand(shape) < 0.5
    bits = pack(mask).to(DEVICE)
    expected = tensor.clone()
    assert effective.mask_weight_(expected, unpack(bits, shape)) == effective_triton.mask_(tensor, bits) == 0
    assert torch.equal(tensor, expected) and not tensor[tensor == 0].signbit().any()
    tensor.fill_(torch.nan)
    assert effective_triton.mask_(tensor, bits) == (~mask).sum()


@pytest.mark.parametrize("family, cached", [("llama", True), ("llama", False), ("gpt2", False), ("mixtral", False)])
def test_the_adapters_train_with_the_kernels_as_with_torch(monkeypatch, family, cached):
    """Linear, Conv1D and fused experts: gradients, and merged weights, of which forward used the same."""
    found = []
    for kernels in (None, effective_triton):
        monkeypatch.setattr(effective.KERNELS, "on_gpu", lambda device, kernels=kernels: kernels)
        torch.manual_seed(0)
        model, masks = with_masks(small_model(family))
        adapted = lora.attach(model.to(DEVICE), masks, Finetune(rank=4), cached).train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        lora.refresh_all(adapted)
        ids = torch.arange(3, 21, device=DEVICE).view(2, 9)
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients = {name: it.grad for name, it in adapted.named_parameters() if it.grad is not None}
        found.append((gradients, {name: it.merged_weight() for name, it in lora.masked_layers(adapted).items()}))
    for torchs, ours in zip(*found):
        assert torchs.keys() == ours.keys() and torchs
        for name in torchs:
            torch.testing.assert_close(ours[name], torchs[name], rtol=1e-4, atol=1e-6)


def test_full_fine_tuning_masks_with_the_kernels_as_with_torch(monkeypatch):
    found = []
    for kernels in (None, effective_triton):
        monkeypatch.setattr(effective.KERNELS, "on_gpu", lambda device, kernels=kernels: kernels)
        torch.manual_seed(0)
        model, masks = with_masks(small_model("llama"))
        model.to(DEVICE)
        recovery = SparseFull(model, masks, Finetune(method="full"))
        recovery.parts = {name: pack(mask).to(DEVICE) for name, mask in masks.items()}
        recovery.parts |= {name: None for name, _ in model.named_parameters() if name not in masks}
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
            parameter.data += 0.1
        recovery.mask_gradients()
        assert recovery.reapply() == 0 and masks.violations(model.named_parameters()) == []
        found.append([tensor for parameter in model.parameters() for tensor in (parameter.grad, parameter.data)])
    assert all(torch.equal(one, other) for one, other in zip(*found))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernels_are_used_on_a_gpu():
    assert effective.KERNELS.on_gpu(torch.device("cuda")) is effective_triton


def test_they_are_checked_before_they_are_used():
    effective.check_kernels(effective_triton, DEVICE)
    wrong = SimpleNamespace(effective=lambda base, *rest: (base, 0), mask_=effective_triton.mask_)
    with pytest.raises(RuntimeError, match="an effective weight that they computed is wrong"):
        effective.check_kernels(wrong, DEVICE)
    wrong = SimpleNamespace(effective=effective_triton.effective, mask_=lambda tensor, bits: 0)
    with pytest.raises(RuntimeError, match="a tensor that they masked is wrong"):
        effective.check_kernels(wrong, DEVICE)
    assert effective.KERNELS.on_gpu(torch.device("cpu")) is None


def test_they_count_as_code_of_the_finetune_stage():
    """Else the stage would not run again after a kernel is edited."""
    assert Path(effective_triton.__file__) in code.used("pipeline.stages.finetune")


def test_the_kernels_compile_for_gpus():
    """Nothing is spilled to the stack. No GPU is needed for this."""
    rows = compiled_for_gpus("tests.recovery.compile_effective")
    assert len(rows) == 12 and all(int(row.split()[-1]) <= 16 for row in rows), rows
