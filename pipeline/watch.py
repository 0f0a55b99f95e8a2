"""Owns the hooks that watch the inputs of a layer's matrices while calibration text flows through it."""

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn

from pipeline.decoder import Matrix
from pipeline.errors import UserError

SAMPLE = 64  # tokens kept of the first batch, to measure the output error on: a product with more would cost seconds
PART = 1 << 18  # numbers that are summed at once on a CPU


def _add_to(total: Tensor, seen: Tensor) -> None:
    """Part by part on a CPU, where fresh memory for all of `seen` in float64 takes five times as long as the sum."""
    length = PART if total.device.type == "cpu" else total.numel()
    for sum_, part in zip(total.view(-1).split(length), seen.reshape(-1).split(length)):
        sum_ += part.double()


class EveryInputSeen(Exception):
    """Raised inside a layer once each matrix has seen its input: the rest of the layer need not be computed."""


class InputWatch:
    """Sums `observe(input_NI)` in float64 over all inputs of each matrix; matrices that are given the same tensor (q, k and
    v; gate and up) share one sum, kept under the name of the first, their leader."""

    def __init__(self, matrices: dict[str, Matrix], observe: Callable[[Tensor], Tensor]) -> None:
        self.matrices, self.observe = matrices, observe
        self.totals: dict[str, Tensor] = {}
        self.samples: dict[str, Tensor] = {}
        self.leader: dict[str, str] = {}
        self.tokens: Counter[str] = Counter()
        self._left = set(matrices)
        self._last: tuple[Tensor, str] | None = None
        self._hooks = []
        self._experts: dict[nn.Module, dict[tuple[str, int], str]] = {}
        for name, matrix in matrices.items():
            if matrix.expert is None:
                self._hooks.append(matrix.module.register_forward_pre_hook(self._hook(name)))
            else:
                self._experts.setdefault(matrix.module, {})[matrix.attribute, matrix.expert] = name
        for module, names in self._experts.items():
            module.watch = self._watch_experts(names)

    def _hook(self, name: str):
        def see(module: nn.Module, args: tuple) -> None:  # must return None: anything else would replace the inputs
            self._see(name, args[0])

        return see

    def _watch_experts(self, names: dict[tuple[str, int], str]):
        return lambda attribute, expert, tensor: self._see(names[attribute, expert], tensor)

    def _see(self, name: str, tensor: Tensor) -> None:
        if self._last is None or self._last[0] is not tensor:
            self._last = (tensor, self.leader.setdefault(name, name))
            self._add(self._last[1], tensor.detach().flatten(0, -2))
        else:
            self.leader.setdefault(name, self._last[1])
        self._left.discard(name)
        if not self._left:
            raise EveryInputSeen

    def _add(self, leader: str, input_NI: Tensor) -> None:
        seen = self.observe(input_NI)
        self.tokens[leader] += len(input_NI)
        if leader in self.totals:
            _add_to(self.totals[leader], seen)
        else:
            self.totals[leader] = seen.double().contiguous()
            self.samples[leader] = input_NI[:SAMPLE].clone()

    def leader_of(self, name: str) -> str:
        if name not in self.leader:
            raise UserError(f"{name} saw no calibration text: the layer never calls it")
        return self.leader[name]

    def next_batch(self) -> None:
        self._left = set(self.matrices)
        self._last = None

    def close(self) -> None:
        """Unhooks. An expert that no token of this rank reached has a sum of nothing, as all ranks must bring one."""
        for hook in self._hooks:
            hook.remove()
        for module in self._experts:
            del module.watch
        self._last = None
        for name, matrix in self.matrices.items():
            if matrix.expert is not None and name not in self.leader:
                nothing_NI = matrix.weight_OI.new_zeros(0, matrix.weight_OI.shape[1])
                self.leader[name] = name
                self.totals[name] = self.observe(nothing_NI).double()
                self.samples[name] = nothing_NI
