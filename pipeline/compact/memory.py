"""Memory for weights that are read whole for every token: in pages of 2 MiB, where Linux has them, which a CPU reads faster."""

import mmap

import torch
from torch import Tensor

BLOCK = 64 << 20  # bytes asked for at a time; what is not written takes no memory
LINE = 64  # bytes: vectors that cross a line of the cache load more slowly


class HugePages:
    """Copies tensors into blocks of such memory, which live as long as their tensors."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor on the CPU."""
        size = -(-tensor.nbytes // LINE) * LINE
        if size > len(self._block):
            self._block = _block(max(size, BLOCK))
        part, self._block = self._block[: tensor.nbytes], self._block[size:]
        return part.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _block(size: int) -> Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
