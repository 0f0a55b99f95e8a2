"""Copies between the host and a GPU that neither of them waits for."""

from collections.abc import Callable

import torch
from torch import Tensor


class HostCopies:
    """Copies tensors to the host on a stream of its own, while the GPU computes."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def take(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """The tensors on the host, and a function that waits until they have arrived. Those that are on the host already are
        not copied. The caller may drop the originals at once, but not change them in place before the arrival."""
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        if not devices:
            return dict(tensors), lambda: None
        (device,) = devices
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        copies = {}
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                copies[name] = tensor
                if tensor.is_cuda:
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    copies[name] = host.copy_(tensor, non_blocking=True)
                    tensor.record_stream(self._stream)  # its memory is not used anew before it is copied
            arrived = torch.cuda.Event(blocking=True)
            arrived.record(self._stream)
        return copies, arrived.synchronize
