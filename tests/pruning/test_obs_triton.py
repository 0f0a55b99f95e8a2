"""The kernel of the column loop gives what the loop in torch gives: under Triton's interpreter, or compiled on a GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.pruning import obs, obs_kernel
from pipeline.pruning.obs_methods import MagnitudeIter, SparseGpt, WandaIter
from pipeline.runtime import code
from pipeline.sparsity.patterns import NofM, Unstructured, parse
from tests.conftest import compiled_for_gpus

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton")
obs_triton = pytest.importorskip("pipeline.pruning.obs_triton", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
METHODS = {"sparsegpt": SparseGpt, "magnitude_iter": MagnitudeIter, "wanda_iter": WandaIter}
CASES = [("0.5", "sparsegpt"), ("0.7", "wanda_iter"), ("2of4", "sparsegpt"), ("2of4", "magnitude_iter")]
CASES += [("4of8", "wanda_iter"), ("3of6", "sparsegpt")]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def small(monkeypatch):
    """Blocks of 32 columns: the interpreter takes 10 ms for a column of a program."""
    monkeypatch.setattr(obs, "BLOCK", 32)
    monkeypatch.setattr(obs_triton, "BLOCK", 32)
    monkeypatch.setattr(obs, "WIDTH", 8)


class Matrix:
    """A random matrix, (R, I), and the factor of correlated inputs, some of them dead."""

    def __init__(self, rows: int, inputs: int, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)
        input_NI = torch.randn(2 * inputs, inputs, generator=generator, device=device)
        input_NI += input_NI.roll(1, 1) + input_NI[:, :1]
        input_NI[:, ::13] = 0
        self.gram_II = input_NI.T @ input_NI
        self.factor_II, dead_I = obs.factor(self.gram_II.clone(), 0.01, "w", print)
        self.weight_RI = torch.randn(rows, inputs, generator=generator, device=device).masked_fill_(dead_I, 0)

    def prune(
        self, sparsity: str, method: str, kernel: bool, device: torch.device, rows=slice(None)
    ) -> tuple[Tensor, Tensor]:
        """The pruned weights and the mask, by the kernel or the loop in torch."""
        pattern, weight_RI, factor_II = (
            parse(sparsity),
            self.weight_RI[rows].to(device, copy=True),
            self.factor_II.to(device),
        )
        score = METHODS[method].obs_score(None, factor_II.diagonal(), self.gram_II.diagonal().to(device))

        def choose(weight_RB: Tensor, columns: slice) -> Tensor:
            return pattern.select(score[columns].of(weight_RB), whole_matrix=True)

        chosen = (choose,) if isinstance(pattern, Unstructured) else (None, score, pattern)
        prune_block = obs_triton.prune_block if kernel else None
        tile = obs.ROW_TILE if weight_RI.is_cuda else None
        mask_RI = obs.prune_rows(weight_RI, factor_II, *chosen, tile=tile, prune_block=prune_block)
        return weight_RI, mask_RI


def assert_same(ours: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], atol: float, other_rows: int = 0) -> None:
    """Weights and masks; `other_rows` may have another mask, because a rounding moved a score across a threshold."""
    (weight_RI, mask_RI), (expected_RI, kept_RI) = [[part.cpu() for part in found] for found in (ours, other)]
    same_R = (mask_RI == kept_RI).all(1)
    assert (~same_R).sum() <= other_rows and 0 < kept_RI.count_nonzero() < kept_RI.numel()
    torch.testing.assert_close(weight_RI[same_R], expected_RI[same_R], rtol=0, atol=atol)
    assert not weight_RI[~mask_RI].any()


@pytest.mark.parametrize(("sparsity", "method"), CASES)
def test_the_kernel_agrees_with_torch(small, sparsity, method):
    """Rows that do not fill the last program, a narrower last block, dead inputs."""
    matrix = Matrix(obs_triton.ROWS + 3, 72)
    assert_same(matrix.prune(sparsity, method, True, DEVICE), matrix.prune(sparsity, method, False, "cpu"), 1e-5)


def test_a_mask_that_is_given(small):
    """As for `prune.update=obs`."""
    matrix = Matrix(5, 40)
    mask_RI = parse("0.6").select(matrix.weight_RI.abs())
    found = []
    for device, prune_block in ((DEVICE, obs_triton.prune_block), ("cpu", None)):
        weight_RI, on_device = matrix.weight_RI.to(device, copy=True), mask_RI.to(device)
        kept_RI = obs.prune_rows(
            weight_RI,
            matrix.factor_II.to(device),
            lambda _, columns, on_device=on_device: on_device[:, columns],
            prune_block=prune_block,
        )
        assert torch.equal(kept_RI, on_device)
        found.append((weight_RI, kept_RI))
    assert_same(*found, 1e-5)


@pytest.mark.parametrize("sparsity", ["2of4", "4of8"])
def test_a_row_does_not_depend_on_the_others(small, sparsity):
    """To the bit, in another program or place of it; a rank may have no rows."""
    block = Matrix(obs_triton.ROWS + 3, 32)

    def errors(rows: slice) -> Tensor:
        weight_BR = block.weight_RI[rows].T.contiguous().to(DEVICE)
        kept_BR = torch.empty_like(weight_BR, dtype=torch.bool)
        score = obs.Score(block.factor_II.diagonal().to(DEVICE) ** 2, squared=True)
        error_BR = obs_triton.prune_block(weight_BR, kept_BR, block.factor_II.to(DEVICE), score, parse(sparsity))
        return torch.stack([weight_BR, kept_BR, error_BR])

    parts = [slice(0, 2), slice(2, obs_triton.ROWS + 3), slice(0, 0)]
    assert torch.equal(torch.cat([errors(part) for part in parts], 2), errors(slice(None)))


def test_equal_scores_as_by_the_pattern_on_a_gpu(small):
    """Of equal scores the later are kept, in groups that are all zero too."""
    score_RI = torch.tensor([[2.0, 2, 2, 2, 0, 0, 0, 0, 3, 1, 3, 3, 1, 5, 1, 1]])
    kept_BR = torch.empty(16, 1, dtype=torch.bool, device=DEVICE)
    weight_BR = score_RI.T.contiguous().to(DEVICE)
    ones = obs.Score(torch.ones(16, device=DEVICE))
    obs_triton.prune_block(weight_BR, kept_BR, torch.eye(16, device=DEVICE), ones, NofM(2, 4))
    assert torch.equal(kept_BR.cpu().T, NofM(2, 4)._by_rank(score_RI.unflatten(1, (-1, 4))).flatten(1))


def test_groups_wider_than_a_block_use_torch(small):
    matrix = Matrix(3, 80)
    assert_same(
        matrix.prune("20of40", "sparsegpt", True, DEVICE), matrix.prune("20of40", "sparsegpt", False, "cpu"), 1e-5
    )


def test_it_is_checked_before_it_is_used(small, monkeypatch):
    monkeypatch.setattr(obs_triton, "BLOCK", 64)
    monkeypatch.setattr(obs_triton, "ROWS", 32)
    obs_kernel.check(obs_triton, DEVICE)
    wrong = SimpleNamespace(prune_block=lambda *args: obs.prune_block_by_torch(*args) * 1.001)
    with pytest.raises(RuntimeError, match="a block that they pruned is wrong"):
        obs_kernel.check(wrong, DEVICE)


def test_where_it_is_not_used(monkeypatch, capsys):
    """On a CPU, which needs no word; or under the interpreter for tensors on a GPU, as on a simulated one."""
    assert obs_kernel.load(torch.device("cpu")) is None and not capsys.readouterr().out
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(obs_kernel.KERNELS, "loaded", {})
    assert obs_kernel.load(torch.device("cuda", 0)) is None
    assert "no Triton kernels for the column loop: TRITON_INTERPRET is set" in capsys.readouterr().out


def test_it_counts_as_code_of_the_methods():
    """Else a stage would not run again after the kernel is edited."""
    for module in ("pipeline.pruning.obs_methods", "pipeline.pruning.updates"):
        assert Path(obs_triton.__file__) in code.used(module)


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus():
    """Nothing is spilled to the stack. No GPU is needed for this."""
    rows = compiled_for_gpus("tests.pruning.compile_obs")
    assert len(rows) == 8 and all(row.endswith(" 0") for row in rows), rows


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", ["0.5", "0.7", "2of4", "4of8", "1of4", "3of6", "16of32"])
def test_a_gpu_agrees_with_the_cpu(sparsity, method):
    matrix = Matrix(64, 510 if sparsity == "3of6" else 512)
    assert obs_kernel.load(DEVICE) is obs_triton.prune_block
    ours, other = matrix.prune(sparsity, method, True, DEVICE), matrix.prune(sparsity, method, False, "cpu")
    assert_same(ours, other, 1e-4, other_rows=2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("sparsity", ["0.5", "2of4"])
def test_the_errors_of_a_large_matrix(sparsity):
    """The output error, (w - w') H (w - w')^T, of the kernel and of the loop in torch."""
    matrix = Matrix(4096, 4096, DEVICE)
    errors, kept = [], []
    for kernel in (True, False):
        weight_RI, mask_RI = matrix.prune(sparsity, "sparsegpt", kernel, DEVICE)
        change_RI = matrix.weight_RI - weight_RI
        errors.append((change_RI @ matrix.gram_II * change_RI).sum().item())
        kept.append(mask_RI)
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert (kept[0] != kept[1]).float().mean() < 1e-3
