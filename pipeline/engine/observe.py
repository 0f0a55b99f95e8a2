"""Sums statistics of the inputs of a block's matrices while calibration text flows through it.

Shapes: N = tokens, I = in_features.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.engine.matrices import PRODUCTS, Matrix
from pipeline.models.pointwise import PointwiseConv
from pipeline.runtime.errors import UserError
from pipeline.runtime.user_code import check_returned, unchanged

SAMPLE = 64  # tokens of the first batch kept to measure the output error; more would cost seconds
PART = 1 << 18  # elements summed at once on a CPU
# functions that multiply an input with a weight
LINEAR = (F.linear,)
MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
PRODUCT_ARGUMENTS = ("input", "weight", "other", "mat2")


class _AllInputsSeen(Exception):
    """Raised inside a block once each matrix has seen all its inputs, so that the rest of the block is not computed."""


@dataclass
class Observed:
    """Statistics of one block. Matrices with the same input tensor (q, k and v; gate and up) share one sum, stored under the
    name of the first of them, the key."""

    shared_input_key: dict[str, str] = field(default_factory=dict)  # by matrix; without those that were never called
    totals: dict[str, Tensor] = field(default_factory=dict)  # by key: the sum of `observe(input_NI)`, float64
    samples: dict[str, Tensor] = field(default_factory=dict)  # by key: the first inputs, (at most SAMPLE, I)
    tokens: Counter[str] = field(default_factory=Counter)  # by key


class InputObserver:
    """Sums `observe(input_NI)` over all inputs of each matrix. Call the block as usual inside `batch()`. The call may end early
    by an exception, which `batch` catches."""

    def __init__(self, matrices: dict[str, Matrix], observe: Callable[[Tensor], Tensor]) -> None:
        self.matrices, self.observe = matrices, observe
        self.observed = Observed()
        self._calls_per_batch: Counter[str] | None = None  # calls per matrix in a batch, if every batch makes the same
        self._linear = {name: matrix for name, matrix in matrices.items() if matrix.expert is None}
        self._fused = _FusedProducts({n: m for n, m in matrices.items() if m.expert is not None}, self._record)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Observes the block while one batch runs through it. Raises `UserError` if two matrices share only some inputs."""
        self._calls: Counter[str] = Counter()
        self._last: tuple[Tensor, int, str] | None = None
        with ExitStack() as stack:
            for name, matrix in self._linear.items():
                stack.callback(matrix.module.register_forward_pre_hook(self._hook(name), with_kwargs=True).remove)
                if type(matrix.module).forward not in PRODUCTS and name not in self.observed.shared_input_key:
                    stack.callback(matrix.module.register_forward_hook(_check_product, with_kwargs=True).remove)
            if self._fused.matrices:
                stack.enter_context(eager_experts({m.module for m in self._fused.matrices.values()}))
                stack.enter_context(self._fused)
            try:
                yield
            except _AllInputsSeen:
                pass
            finally:
                self._last = None
        for name, key in self.observed.shared_input_key.items():
            if self._calls[name] and self._calls[name] != self._calls[key] and not self.matrices[name].routed:
                raise UserError(f"{name} shares some but not all of its inputs with {key}, which is not supported")
        if self._calls_per_batch is None and not any(matrix.routed for matrix in self.matrices.values()):
            self._calls_per_batch = self._calls

    def _hook(self, name: str) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:  # returning a value would replace the inputs
            self._record(name, _input(args, kwargs))

        return record

    def _record(self, name: str, tensor: Tensor) -> None:
        found = self.observed
        if self._last is None or self._last[0] is not tensor or self._last[1] != tensor._version:
            self._last = (tensor, tensor._version, found.shared_input_key.setdefault(name, name))
            is_conv = isinstance(self.matrices[name].module, PointwiseConv)
            input_NI = tensor.detach().movedim(-3, -1) if is_conv else tensor.detach()  # from (B, I, H, W)
            self._add(self._last[2], input_NI.flatten(0, -2))
        else:
            found.shared_input_key.setdefault(name, self._last[2])
        self._calls[name] += 1
        if self._calls == self._calls_per_batch:
            raise _AllInputsSeen

    def _add(self, key: str, input_NI: Tensor) -> None:
        found = self.observed
        with unchanged("observe", input_NI=input_NI):
            values = self.observe(input_NI)
        # a sum has the same shape for any number of tokens
        check_returned("observe", values, found.totals[key].shape if key in found.totals else None)
        found.tokens[key] += len(input_NI)
        if key in found.totals:
            _accumulate_(found.totals[key], values)
        else:
            found.totals[key] = values.double().contiguous()
        if not len(found.samples.get(key, ())):
            found.samples[key] = input_NI[:SAMPLE].clone()


class _FusedProducts(TorchFunctionMode):
    """Sees each product of an input with a slice of a fused parameter, however the module slices it. The slice's address
    gives the expert; its strides give the dimension that is summed."""

    def __init__(self, matrices: dict[str, Matrix], record: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.matrices, self.record = matrices, record
        self._names = {(m.module, m.attribute, m.expert): name for name, m in matrices.items()}

    def __enter__(self) -> "_FusedProducts":
        self._places = {m.parameter.data_ptr(): (m.module, m.attribute) for m in self.matrices.values()}
        return super().__enter__()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in LINEAR or func in MATMUL:
            named = [*args, *(kwargs[key] for key in PRODUCT_ARGUMENTS if kwargs and key in kwargs)]
            self._record_product(named[0], named[1], summed=-1 if func in LINEAR else -2)
        return func(*args, **(kwargs or {}))

    def _record_product(self, left: Tensor, weight: Tensor, summed: int) -> None:
        for start, place in self._places.items():
            if 0 <= weight.data_ptr() - start < getattr(*place).nbytes:
                break
        else:
            return
        matrix_size = getattr(*place)[0].numel()
        first = (weight.data_ptr() - start) // weight.element_size() // matrix_size
        inputs = left if weight.dim() == 3 else [left]  # (E, N, I): all experts at once, other experts' tokens are zero
        for expert, input_NI in enumerate(inputs, start=first):
            name = self._names[*place, expert]
            matrix = self.matrices[name]
            transposed = weight.stride(summed) != 1
            if transposed != matrix.transposed or weight.shape[summed] != matrix.weight_OI.shape[1]:
                stored = "(in, out)" if matrix.transposed else "(out, in)"
                raise UserError(
                    f"{name} is not supported: its weight looks stored {stored}, but is multiplied otherwise"
                )
            self.record(name, input_NI if weight.dim() == 2 else input_NI[input_NI.any(-1)])


@contextmanager
def eager_experts(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Makes each expert compute its own product, instead of one grouped product for all."""
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    before = {key: getattr(config, "_experts_implementation", None) for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


def _input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _check_product(module: nn.Linear, args: tuple, kwargs: dict[str, Any], out: Tensor) -> None:
    expected, given = F.linear(_input(args, kwargs), module.weight, module.bias), out.flatten(0, -2)
    if not torch.allclose(given, expected.flatten(0, -2), rtol=1e-2, atol=1e-2 * expected.abs().mean().item()):
        raise UserError(f"{type(module).__name__} is not supported: it does not compute what a Linear does")


def _accumulate_(total: Tensor, values: Tensor) -> None:
    """Adds `values` to the float64 `total`; on a CPU in chunks, since a copy in float64 takes five times as long as the sum."""
    if total.is_cuda:
        total += values  # converted within the kernel
        return
    for sum_, part in zip(total.view(-1).split(PART), values.reshape(-1).split(PART)):
        sum_ += part.double()
