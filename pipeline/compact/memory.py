"""Memory in pages of 2 MiB, where Linux has them: a CPU reads weights from it faster, and reads all of them for every token."""

import mmap

import torch
from torch import Tensor

BLOCK = 64 << 20  # bytes asked for at a time; what is not written takes no memory
LINE = 64  # bytes of a cache line, to which tensors are aligned: vectors that cross one load more slowly


class HugePages:
    """Copies tensors into blocks of such memory, which live as long as their tensors."""

    def __init__(self) -> None:
        self._block, self._used, self._size = None, 0, 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor on the CPU, in a storage of its own: torch.save writes whole storages, and refuses one
        that tensors of several dtypes share."""
        if not tensor.nbytes or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)
        start, self._used = self._used, self._used + -(-tensor.nbytes // LINE) * LINE
        if self._used > self._size:
            self._size = max(self._used - start, BLOCK)
            self._block = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._block.madvise(mmap.MADV_HUGEPAGE)
            start, self._used = 0, self._used - start
        part = torch.frombuffer(self._block, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        return part.view(tensor.shape).copy_(tensor)
