"""On a real GPU: the forms for GPUs select what the forms for CPUs do, and copies that nobody waits for arrive whole."""

import pytest
import torch
from torch import nn

from pipeline.engine.blocks import Block
from pipeline.engine.read_ahead import CHUNK, ReadAhead
from pipeline.pruning import gram, scores
from pipeline.runtime import launcher
from pipeline.runtime.copies import HostCopies
from pipeline.sparsity import patterns

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def device() -> torch.device:
    return launcher.device()


@pytest.mark.parametrize("sparsity", ["2of4", "4of8", "0.5", "0.3"])
@pytest.mark.parametrize("whole_matrix", [False, True])
def test_masks_are_those_of_a_cpu(device, sparsity, whole_matrix):
    pattern, score = patterns.parse(sparsity), torch.rand(512, 1024)
    assert torch.equal(pattern.select(score.to(device), whole_matrix).cpu(), pattern.select(score, whole_matrix))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ties_in_groups_are_those_of_topk(device, n):
    tied = torch.randint(0, 3, (256, 64, 4), device=device).float()
    pattern = patterns.NofM(n, 4)
    assert torch.equal(pattern._by_rank(tied), pattern._by_topk(tied))


def test_a_threshold_of_a_large_matrix_with_ties(device):
    score = torch.randint(0, 10**6, (1, 5 * 10**6), device=device).float()
    for k in (1, 10**6, 2 * 10**6 + 1, 4 * 10**6, score.numel()):
        assert torch.equal(patterns.kth_lowest(score, k)[0], score[0].sort().values[k - 1 : k]), k


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32])
def inputs(request, device) -> torch.Tensor:
    torch.set_float32_matmul_precision("highest")  # as the command does
    return (10 * torch.randn(2048, 640, device=device)).to(request.param)


def test_square_sums(inputs):
    exact = inputs.double().square().sum(0)
    assert float(((scores.square_sum(inputs) - exact) / exact).abs().max()) < 1e-5


def test_square_sums_need_no_copy_of_the_inputs(inputs):
    inputs = inputs.repeat(64, 4)  # large beside the memory in which the blocks of a sum meet: 133 MiB on an H200
    scores.square_sum(inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores.square_sum(inputs)
    assert torch.cuda.max_memory_allocated() - before < inputs.nbytes / 2


def test_gram_matrices(inputs):
    exact = inputs.double().T @ inputs.double()
    found = gram.unpacked(gram.packed(inputs), 640).double()
    assert float((found - exact).norm() / exact.norm()) < 1e-5


def test_16_bits_are_multiplied_as_they_are(inputs, device):
    if inputs.dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0):
        assert gram.multiplies_16_bits(device, inputs.dtype)


def test_copies_arrive_whole_though_their_originals_are_dropped(device):
    values = torch.arange(3 * CHUNK // 4 + 5, dtype=torch.int32)  # of several chunks
    module = nn.Module()
    module.weight = nn.Parameter(values.clone(), requires_grad=False)
    module.scale = nn.Parameter(torch.randn(300, 7).half(), requires_grad=False)
    block, ahead, copies = Block(0, "layer", module), ReadAhead(device, set()), HostCopies()
    for _ in range(3):
        busy = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            busy = busy @ busy / 64
        ahead.start(block)
        on_gpu = dict(zip(("weight", "scale"), ahead.take(block).values()))
        on_gpu["weight"].add_(1)
        on_host, arrived = copies.take(on_gpu)
        del on_gpu
        torch.full((values.numel(),), -1, dtype=torch.int32, device=device)  # would reuse the memory
        arrived()
        assert torch.equal(on_host["weight"], values + 1) and torch.equal(on_host["scale"], module.scale)
    ahead.start(block)
    assert ahead.take(Block(1, "other", module)) == {} and not ahead.enabled  # a wrong guess
