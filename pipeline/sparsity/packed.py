"""A mask at 1 bit per weight."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.runtime.errors import UserError
from pipeline.sparsity import patterns


@dataclass(frozen=True)
class Packed:
    """A mask at 1 bit per weight, and the pattern that it claims."""

    bits: Tensor  # uint8; the mask flattened, lowest bit first
    shape: tuple[int, ...]
    pattern: str
    transposed: bool = False  # the parameter is stored (in, out), as by GPT-2's Conv1D

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        return int(np.bitwise_count(self.bits.numpy()).sum())

    def unpack(self) -> Tensor:
        return unpack(self.bits, self.shape)

    def problem(self) -> str | None:
        """Where the mask breaks the ratio or N of M that it claims, or None."""
        if self.pattern.endswith(".py"):
            return None  # never run code that a file names
        try:
            pattern = patterns.parse(self.pattern)
        except UserError:
            return None  # a user's own pattern, which was checked when the mask was made
        mask = self.unpack().flatten(1)  # a 1x1 convolution's has four dimensions
        return pattern.violation(mask.T if self.transposed else mask)


def pack(mask: Tensor) -> Tensor:
    """Packs a mask into (ceil(n / 8),) uint8, one bit per weight, lowest bit first, on the mask's device."""
    if mask.device.type == "cpu":  # numpy is seven times faster
        return torch.from_numpy(np.packbits(mask.numpy(), axis=None, bitorder="little"))
    bits = F.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: a bool mask of `shape`, on the device of `bits`."""
    if bits.device.type == "cpu":  # numpy takes a third of the time and memory
        flat = np.unpackbits(bits.numpy(), count=math.prod(shape), bitorder="little")
        return torch.from_numpy(flat.view(bool)).view(shape)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).flatten()[: math.prod(shape)].view(shape).bool()
