"""The GPU's kernels give what a dense product in float64 gives: under Triton's interpreter, or compiled on a GPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.compact import compact_model, file_format, gpu_weight
from pipeline.compact.compact_weight import CompactWeight
from pipeline.compact.file_format import compress
from pipeline.compact.forms import BITMASK, Forms
from pipeline.compact.gpu_weight import GpuWeight, error_of, expand_by_torch
from pipeline.models import loading
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe
from pipeline.sparsity.patterns import parse
from tests.compact.test_compact import export, prune_
from tests.conftest import compiled_for_gpus
from tests.engine.test_decoder import small_model
from tests.families import save, text

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton")
kernels_triton = pytest.importorskip("pipeline.compact.kernels_triton", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"  # a program of it takes 0.1 s
TOLERANCE = gpu_weight.TOLERANCE | {torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(kernels_triton, "PROGRAMS", 1)


def a_matrix(
    shape: tuple[int, ...], pattern: str | None, dtype: torch.dtype, values: str = "exact", transposed: bool = False
) -> tuple[torch.Tensor, GpuWeight]:
    """A random matrix on the device, dequantised, and its compact form. No pattern: all are kept."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = (
        torch.ones(shape, dtype=torch.bool) if pattern is None else parse(pattern).select(weight.abs().flatten(0, -2))
    )
    mask = mask.view(shape)
    mask[..., 0, :] = pattern is None  # a row of which nothing is kept
    weight = torch.where(mask, weight, 0.0).to(dtype)
    if transposed:
        weight, mask = weight.transpose(-1, -2).contiguous(), mask.transpose(-1, -2).contiguous()
    packed = compress("w", weight, mask, transposed, ("x",), values)
    return packed.dense().to(DEVICE), GpuWeight.from_cpu(CompactWeight.from_compact(packed, dtype), DEVICE)


def check(weight_OI: torch.Tensor, ours: GpuWeight, tokens: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, weight_OI.shape[1], generator=generator).to(DEVICE, weight_OI.dtype)
    bias = torch.randn(len(weight_OI), generator=generator).to(DEVICE, weight_OI.dtype) if with_bias else None
    expected = F.linear(x.double(), weight_OI.double(), None if bias is None else bias.double())
    found = ours.linear(x[None], bias)
    assert found.dtype == weight_OI.dtype and found.shape == (1, *expected.shape)
    assert error_of(found[0], expected) <= TOLERANCE[weight_OI.dtype]


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the bit; the interpreter rounds bf16 towards zero."""
    if found.dtype == torch.bfloat16 and INTERPRETED:
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("values", file_format.KINDS)
@pytest.mark.parametrize("dtype", gpu_weight.DTYPES)
@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2of4", "4of8", None])
def test_every_pattern(pattern, dtype, values):
    weight, ours = a_matrix((11, 200), pattern, dtype, values)
    assert gpu_weight.KERNELS.load(DEVICE) is kernels_triton
    assert torch.equal(expand_by_torch(ours, torch.empty_like(weight)), weight)
    same(ours.dense(), weight)
    assert ours.shape == weight.shape and ours.is_2_of_4() == (pattern == "2of4")
    few = 2 if INTERPRETED and dtype != torch.float16 else 16  # the interpreter takes them one by one
    for tokens, with_bias in [(1, False), (3 if few == 16 else 1, True), (few, False), (17, True)]:
        check(weight, ours, tokens, with_bias)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (8, 31), (7, 33), (9, 64), (3, 260), (2, 2100)])
def test_odd_sizes(shape):
    """Columns that fill no byte, word or chunk, rows that fill no program; more chunks than one."""
    weight, ours = a_matrix(shape, None if shape == (1, 1) else "0.5", torch.float32)
    assert torch.equal(ours.dense(), weight)
    for tokens in (1, 2):
        check(weight, ours, tokens, True)


def test_nothing_kept_and_no_tokens():
    nothing = torch.zeros(4, 40)
    packed = compress("w", nothing, nothing.bool(), False, ("x",))
    ours = GpuWeight.from_cpu(CompactWeight.from_compact(packed, torch.float32), DEVICE)
    assert not ours.linear(torch.ones(1, 40, device=DEVICE)).any() and not ours.dense().any()
    assert ours.linear(torch.ones(0, 40, device=DEVICE)).shape == (0, 4)


@pytest.mark.parametrize("values", file_format.KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_one_expert_is_a_part_of_the_rows(transposed, values):
    weight, ours = a_matrix((3, 10, 72), "0.5", torch.bfloat16, values, transposed)
    same(ours.dense(), weight)
    for expert in range(3):
        part = weight[expert].T if transposed else weight[expert]
        check(part.contiguous(), ours[expert].T.T, 1, False)
        check(part.contiguous(), ours[torch.tensor(expert)], 2, False)
        same(ours[expert].dense(), weight[expert])


def test_inputs_of_pruned_weights_do_not_matter():
    """Even if they are not finite; the load of a pruned weight's value is of another's."""
    weight, ours = a_matrix((8, 64), "2of4", torch.bfloat16)
    weight[1], x = 0, torch.ones(1, 64, device=DEVICE, dtype=torch.bfloat16)
    x[0, (weight[2] == 0).nonzero()[0]] = torch.inf
    assert ours.linear(x)[0, 2].isfinite()


def test_whatever_torch_does_with_it_sees_it_dense_and_gradients_flow():
    weight, ours = a_matrix((8, 64), "0.5", torch.float32)
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    ours.linear(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 64))
    torch.testing.assert_close((x @ ours.T).detach(), F.linear(x, weight).detach())
    torch.testing.assert_close(torch.add(ours, 1), weight + 1)


def test_other_dtypes_and_wide_matrices_are_expanded_by_torch():
    weight, ours = a_matrix((6, 48), "0.5", torch.float64)
    check(weight, ours, 1, True)
    assert ours._kernels() is None
    weight, ours = a_matrix((2, gpu_weight.WIDEST), "0.5", torch.float32)
    assert ours._kernels() is None and torch.equal(ours.dense(), weight)


def test_without_triton_torch_expands_and_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(kernels_triton, "product", lambda *args: torch.zeros(args[5].shape[0], 24, device=DEVICE))
    monkeypatch.setattr(gpu_weight.KERNELS, "loaded", {})
    weight, ours = a_matrix((9, 72), "0.5", torch.bfloat16, "int8")
    check(weight, ours, 1, True)
    check(weight, ours, 3, True)
    (said,) = capsys.readouterr().out.splitlines()  # once
    assert "no Triton kernels for compact matrices: a product that they computed is wrong" in said


def loaded(folder, pattern: str, model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The dense model and the compact one as on a GPU, all of it in bitmask form."""
    masks = prune_(model, pattern)
    model.save_pretrained(folder / "model")
    export(folder / "model", masks, folder / "compact")
    ours = compact_model._load(folder / "compact", Recipe(), DEVICE, Forms(DEVICE, BITMASK))
    return loading.load(folder / "model", Recipe()).to(DEVICE), ours


@pytest.mark.slow
@pytest.mark.parametrize("family, many", [("gpt2", 18), ("mixtral", 3)])  # 16 tokens are the most that the kernel takes
@torch.no_grad()
def test_models_of_linear_conv1d_and_experts(tmp_path, family, many):
    dense, ours = loaded(tmp_path, "0.5", small_model(family))
    assert sum(row["matrices"] for row in ours.compact_forms) and {row["form"] for row in ours.compact_forms} == {
        BITMASK
    }
    for tokens in (1, many):
        ids = (text(1, tokens) % 60 + 1).to(DEVICE)
        expected, found = (model(input_ids=ids, use_cache=False).logits for model in (dense, ours))
        assert error_of(found, expected.double()) <= 1e-5
    with pytest.raises(UserError, match="pass device= to load_compact"):
        ours.half()


@pytest.mark.slow
@torch.no_grad()
def test_no_matrix_is_made_dense_for_one_token(tmp_path, monkeypatch):
    _, ours = loaded(tmp_path, "2of4", save("gpt_oss", tmp_path / "tokenizer"))
    monkeypatch.setattr(GpuWeight, "matrix", None)
    ours(input_ids=torch.tensor([[3]], device=DEVICE))


def test_bases_and_offsets_fit_the_bits():
    """Every load of a value lies in `values`."""
    _, ours = a_matrix((13, 100), "0.7", torch.float32)
    ones = np.bitwise_count(ours.mask.cpu().numpy().view(np.uint32)).astype(np.int64)
    bases = ours.bases.cpu().numpy().view(np.uint16)
    assert (bases == ones.cumsum(1) - ones).all()
    assert (ours.offsets.cpu().numpy() == np.append(0, ones.sum(1).cumsum())).all()
    assert len(ours.values) == ones.sum() + 1


def test_wrong_arguments_are_refused(tmp_path):
    for arguments, says in [
        ({"form": "csr"}, "form=csr is unknown"),
        ({"tokens": 0}, "tokens=0"),
        ({"device": "warp"}, "device=warp is unknown"),
        ({"device": "meta"}, "runs on cpu or cuda"),
        ({"device": "cuda:99"}, "set device=cpu"),
        ({"form": "dense"}, "needs a GPU"),
    ]:
        with pytest.raises(UserError, match=says):
            compact_model.load_compact(tmp_path, **arguments)


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_and_read_neighbouring_values():
    """Lanes lie along a row's bytes, not across rows, and nothing is spilled to the stack. No GPU is needed for this."""
    rows = compiled_for_gpus("tests.compact.compile_kernels")
    assert len(rows) == 22 and all(row.endswith(" 32 0") for row in rows), rows
