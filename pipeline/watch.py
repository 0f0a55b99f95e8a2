"""Owns the hooks that watch the inputs of a layer's matrices while calibration text flows through it."""

from collections.abc import Callable

from torch import Tensor, nn

SAMPLE = 256  # tokens kept of the first batch, to measure the output error on


class EveryInputSeen(Exception):
    """Raised inside a layer once each matrix has seen its input: the rest of the layer need not be computed."""


class InputWatch:
    """Sums `observe(input_NI)` over all inputs of each matrix; matrices that are given the same tensor (q, k and v; gate
    and up) share one sum."""

    def __init__(self, matrices: dict[str, nn.Module], observe: Callable[[Tensor], Tensor]) -> None:
        self.observe = observe
        self.totals: dict[str, Tensor] = {}  # by the first matrix of each group
        self.samples: dict[str, Tensor] = {}
        self.leader: dict[str, str] = {}
        self.tokens = 0
        self._left = set(matrices)
        self._names = set(matrices)
        self._last: tuple[Tensor, str] | None = None
        self._hooks = [m.register_forward_pre_hook(self._hook(name)) for name, m in matrices.items()]

    def _hook(self, name: str):
        def see(module: nn.Module, args: tuple) -> None:  # must return None: anything else would replace the inputs
            tensor = args[0]
            if self._last is None or self._last[0] is not tensor:
                self._last = (tensor, self.leader.setdefault(name, name))
                self._add(self._last[1], tensor.detach().flatten(0, -2))
            else:
                self.leader.setdefault(name, self._last[1])
            self._left.discard(name)
            if not self._left:
                raise EveryInputSeen

        return see

    def _add(self, leader: str, input_NI: Tensor) -> None:
        seen = self.observe(input_NI)
        if leader in self.totals:
            self.totals[leader] += seen
        else:
            self.totals[leader] = seen
            self.samples[leader] = input_NI[:SAMPLE].clone()

    def next_batch(self) -> None:
        self._left = set(self._names)
        self._last = None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = None
