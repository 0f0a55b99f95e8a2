"""Whether a GPU has a kernel for the column loop of `obs.prune_rows`. Without one the loop runs in torch."""

from types import ModuleType

import torch

from pipeline.pruning import obs
from pipeline.runtime.triton_kernels import TritonKernels
from pipeline.sparsity.patterns import NofM

TOLERANCE = 1e-4  # of a weight or an error after 48 columns in fp32, relative to the largest


def load(device: torch.device) -> obs.PruneBlock | None:
    """The kernel, checked on the device. None on a CPU, without Triton, or if a check fails, which is reported once."""
    kernels = KERNELS.on_gpu(device)
    return kernels and kernels.prune_block


def _imported() -> ModuleType:
    from pipeline.pruning import obs_triton  # imports triton

    return obs_triton


def check(kernels: ModuleType, device: torch.device) -> None:
    """Compares the kernels with torch's loop on a small matrix. Raises `RuntimeError` if they differ."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 32, 48  # multiples of 16, as most are: the kernel is compiled for those
    weight_BR = torch.randn(columns, rows, generator=generator)
    given_BR = torch.rand(columns, rows, generator=generator) < 0.5
    factor_BB = 0.2 * torch.randn(columns, columns, generator=generator).triu(1)
    factor_BB.diagonal().copy_(0.5 + torch.rand(columns, generator=generator))
    scale_B = 0.5 + torch.rand(columns, generator=generator)
    for squared in (None, True, False):
        selection = (None, None) if squared is None else (obs.Score(scale_B, squared), NofM(2, 4))
        expected = (weight_BR.clone(), given_BR.clone())
        found = tuple(part.to(device, copy=True) for part in expected)
        expected += (obs.prune_block_by_torch(*expected, factor_BB, *selection),)
        if selection[0]:
            selection = (obs.Score(scale_B.to(device), squared), NofM(2, 4))
        found += (kernels.prune_block(*found, factor_BB.to(device), *selection),)
        for ours, other in zip(found, expected):
            ours, other = ours.cpu().float(), other.float()
            if not torch.allclose(ours, other, rtol=0, atol=TOLERANCE * float(other.abs().max())):
                raise RuntimeError("a block that they pruned is wrong")


KERNELS = TritonKernels(_imported, check, "the column loop", "each column takes several launches, which is slow")
