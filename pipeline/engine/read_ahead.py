"""Copies the weights of the next block to the GPU while a block is computed."""

import functools
from collections.abc import Collection

import torch
from torch import Tensor

from pipeline.engine.blocks import Block
from pipeline.runtime.background import Background

CHUNK = 32 << 20  # bytes; two pinned buffers of this size are in use


class ReadAhead:
    """A thread reads the weights, from their file if they are mapped, into pinned buffers, from which the GPU copies them on a
    stream of its own: a copy from ordinary memory keeps the host waiting, and with it the GPU.

    The next block is a guess: after a wrong one, nothing more is read ahead. Tensors whose ids are in `shared` are left out,
    because the block before may change them. On a CPU nothing is done.
    """

    def __init__(self, device: torch.device, shared: Collection[int]) -> None:
        self.device, self.shared, self.enabled = device, shared, device.type == "cuda"
        self._block: Block | None = None
        self._copies: list[tuple[Tensor, Tensor, Tensor]] = []  # a tensor, its data on the host, and the copy
        if self.enabled:
            self._stream = torch.cuda.Stream(device)
            self._background = Background()

    def start(self, block: Block) -> None:
        """Starts to copy the tensors of a block that are on the host. Their data must not change until `take`."""
        if not self.enabled:
            return
        for tensor in block.tensors():
            on_host = tensor.device.type == "cpu" and tensor.numel() and tensor.is_contiguous()
            if on_host and id(tensor) not in self.shared:
                self._copies.append((tensor, tensor.data, torch.empty_like(tensor.data, device=self.device)))
        if self._copies:
            self._block = block
            # the new memory may be in use by what was launched before
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            self._background.start(functools.partial(self._copy, [copies[1:] for copies in self._copies]))

    def take(self, block: Block | None) -> dict[int, Tensor]:
        """The copies of a block's tensors, by the id of the tensor; none if another block was read. The current stream waits
        for them."""
        if self._block is None:
            return {}
        self.enabled = self._block is block
        self._block = None
        copies, self._copies = self._copies, []
        self._background.wait()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        if not self.enabled:
            return {}
        return {id(tensor): copy for tensor, data, copy in copies if tensor.data_ptr() == data.data_ptr()}

    @torch.no_grad()
    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):  # both are settings of a thread
            size = min(CHUNK, max(data.nbytes for data, _ in pairs))
            buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            sent = [torch.cuda.Event(blocking=True) for _ in buffers]
            turn = 0
            for pair in pairs:
                source, target = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in pair)
                for part, place in zip(source.split(CHUNK), target.split(CHUNK)):
                    sent[turn].synchronize()  # what was in the buffer has left it
                    place.copy_(buffers[turn][: len(part)].copy_(part), non_blocking=True)
                    sent[turn].record(self._stream)
                    turn = 1 - turn
