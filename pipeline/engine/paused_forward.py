"""A model's own forward, paused whenever it reaches a block.

It assumes nothing about how a model calls its blocks: per-token arguments, shared state, repeated blocks and any form of
output all work. Greenlets stay in one thread, so device, stream and autocast are unaffected.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet


class PausedForward(greenlet):
    """One call of a model, paused at each block. `index`, `args` and `kwargs` are those of the pending block call; `index`
    is None once the model has returned `result`."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self.call = call
        self.index: int | None = None
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}
        self.result: Any = None
        self._grad = False

    def run(self, *_: Any) -> None:  # called by the first switch
        self.result = self.call()

    def resume(self, output: Any = None) -> None:
        """Runs on to the next block; `output` is what the last block returned."""
        outer = torch.is_grad_enabled()
        torch.set_grad_enabled(self._grad)  # grad mode is per thread, and the model may have set its own
        try:
            self.index, self.args, self.kwargs = self.switch(output) or (None, (), {})
        finally:
            self._grad = torch.is_grad_enabled()
            torch.set_grad_enabled(outer)


def pausable(index: int, forward: Callable) -> Callable:
    """The forward of a block: pauses inside a `PausedForward`, runs normally elsewhere."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        running = getcurrent()
        if isinstance(running, PausedForward):
            return running.parent.switch((index, args, kwargs))
        return forward(*args, **kwargs)

    return call
