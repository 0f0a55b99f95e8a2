"""Runs a model block by block: its own forward, once per batch, paused whenever it reaches a block (paused_forward.py)."""

import copy
import functools
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import TensorWeakRef
from transformers import Cache

from pipeline.engine.blocks import Block, shared_parameters, tensors_outside
from pipeline.engine.paused_forward import PausedForward, pausable
from pipeline.engine.read_ahead import ReadAhead
from pipeline.runtime.errors import UserError

SMALL = 4096  # elements; moving smaller arguments (such as a position scale) to the host is not worth it


class LayerwiseForwards:
    """The forwards of one model over several batches, all paused at the same block, `current` (None at the end).

    `call(batch)` calls the model. Each block is moved to `device` when it is reached, or to a GPU while the block before it is
    computed. `hidden_device`: the device that holds the arguments of paused forwards (None: they are not moved).

    What happens to weights that the caller changes:
    - with `restore`, every block's weights are dropped once it is passed, and `restore(block)` loads them again if it is
      reached again. The blocks in `dropped` start with dropped weights.
    - with `write_back`, changed weights are copied back to where the block came from.
    - with neither, the caller must not change weights.

    `dense_outputs`: the next block gets the output that a block has with its original weights, not with changed ones; then no
    block may be reached twice, or share weights with another.

    A context manager: inside, the blocks' `forward` is replaced; at its end, everything that was moved is moved back.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        call: Callable[[Tensor], Any],
        batches: Iterable[Tensor],
        device: torch.device,
        hidden_device: torch.device | None = None,
        restore: Callable[[Block], None] | None = None,
        dropped: Iterable[int] = (),
        write_back: bool = False,
        dense_outputs: bool = False,
    ) -> None:
        self.model, self.blocks, self.call, self.batches = model, blocks, call, list(batches)
        self.device, self.restore, self.write_back, self.dense_outputs = device, restore, write_back, dense_outputs
        self.hidden_device = None if hidden_device == device else hidden_device
        self.current: Block | None = None
        self.forwards: list[PausedForward] = []
        self._offloaded: list[dict[int, TensorWeakRef]] = [{} for _ in self.batches]
        self._shared = shared_parameters(blocks)
        self._ahead = ReadAhead(device, self._shared)
        self._dropped = set(dropped)
        # the parameters of the current block, and the data they came with
        self._dense: list[tuple[Tensor, Tensor]] = []
        self._reached: set[int] = set()  # with `dense_outputs`
        # tensors of the current block, and their data where it came from
        self._home_data: list[tuple[Tensor, Tensor]] = []
        self._outside_data: list[tuple[Tensor, Tensor]] = []  # the same for tensors outside the blocks

    def __enter__(self) -> "LayerwiseForwards":
        for tensor in tensors_outside(self.model, self.blocks):
            if tensor.device != self.device:
                self._outside_data.append((tensor, tensor.data))
                tensor.data = tensor.data.to(self.device)
        # the model's own call runs a block's hooks before the pause and after the resume, so we call forward alone
        self._original_forwards = [block.module.forward for block in self.blocks]
        for block, original in zip(self.blocks, self._original_forwards):
            block.module.forward = pausable(block.index, original)
        return self

    def __exit__(self, *_: Any) -> None:
        for block, original in zip(self.blocks, self._original_forwards):
            del block.module.forward
            if block.module.forward != original:  # set on the instance, as accelerate's hooks do
                block.module.forward = original
        outer = torch.is_grad_enabled()
        for forward in self.forwards:
            if forward:  # still paused: its frames would keep their tensors until garbage collection
                forward.throw()
        torch.set_grad_enabled(outer)  # forwards that ended here left their own mode
        self.forwards = []
        with suppress(RuntimeError):  # after a fault of the GPU
            self._ahead.take(None)
        self._move_home()  # the last block, or one in which a fault ended the walk
        for tensor, home in self._outside_data:
            tensor.data = home
        self._outside_data = []

    @torch.no_grad()
    def start(self) -> None:
        """Runs all forwards to their first block."""
        self.forwards = [PausedForward(functools.partial(self.call, batch.to(self.device))) for batch in self.batches]
        for i, forward in enumerate(self.forwards):
            forward.resume()
            self._offload(i)
        self._enter_block()

    def run_block(self, i: int) -> Tensor:
        """Returns the hidden states of the current block for batch i, (B, T, D) for most models. Repeatable: tensors, lists
        and dicts among the arguments stay unchanged (a custom object that the block mutates would be mutated twice)."""
        return hidden_states(self.call_block(i)[0])

    def call_block(self, i: int, dtype: torch.dtype | None = None) -> tuple[Any, tuple, dict[str, Any]]:
        """`run_block`, which returns the whole output and the arguments as the block left them. `dtype`: of the
        floating-point tensors among the arguments."""
        self._load_back(i)
        forward = self.forwards[i]
        # detached aliases: backward may need them after the originals were offloaded
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (forward.args, forward.kwargs))
        if dtype is not None:
            args, kwargs = _converted((args, kwargs), dtype)
        # XLM always passes a cache
        kwargs = {k: copy.deepcopy(v) if isinstance(v, Cache) else v for k, v in kwargs.items()}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in tensors]
        try:
            return self._original_forwards[self.current.index](*args, **kwargs), args, kwargs
        except StopIteration as error:  # Lightning would take it for the end of the data and stop silently
            raise UserError(f"{self.current.name} raises StopIteration in its forward: fix the model's code") from error
        finally:
            self._offload(i)
            if versions != [tensor._version for tensor in tensors]:
                raise UserError(f"{self.current.name} changes its inputs in place, which is not supported")

    @torch.no_grad()
    def advance(self, on_output: Callable[[int, Tensor], None] | None = None) -> Iterator[Any]:
        """Runs the current block and continues each model forward to the next one; yields the results of those that end.

        Calls `on_output(batch number, hidden states)` for each batch. The iterator must be exhausted.
        """
        self._exchange_dense()
        for i, forward in enumerate(self.forwards):
            self._load_back(i)
            output = self._original_forwards[self.current.index](*forward.args, **forward.kwargs)
            if on_output:
                on_output(i, hidden_states(output))
            forward.args, forward.kwargs = (), {}
            forward.resume(output)
            del output
            self._offload(i)
            if forward.index is None:
                yield forward.result
                forward.result = None
        self._exchange_dense()
        self._leave_block()
        self._enter_block()

    def results(self, before_block: Callable[[Block], None] = lambda block: None) -> Iterator[Any]:
        """The model's result for each batch, in order; calls `before_block(block)` before each block runs."""
        self.start()
        while self.current is not None:
            before_block(self.current)
            yield from self.advance()

    def _enter_block(self) -> None:
        reached = {forward.index for forward in self.forwards}
        if len(reached) > 1:
            names = sorted("the end" if index is None else self.blocks[index].name for index in reached)
            raise UserError(
                f"the batches take different paths through the model: one is at {names[0]}, one at {names[1]}"
            )
        index = next(iter(reached), None)
        self.current = None if index is None else self.blocks[index]
        copies = self._ahead.take(self.current)
        if self.current is None:
            return
        if self.dense_outputs:
            self._remember_dense()
        if index in self._dropped:
            self.restore(self.current)
            self._dropped.discard(index)
        for tensor in self.current.tensors():
            if tensor.device != self.device:
                self._home_data.append((tensor, tensor.data))
                ahead = copies.get(id(tensor))
                tensor.data = tensor.data.to(self.device, non_blocking=True) if ahead is None else ahead
        if index + 1 < len(self.blocks) and index + 1 not in self._dropped:
            self._ahead.start(self.blocks[index + 1])

    def _remember_dense(self) -> None:
        sharing = [block.name for block in self.blocks if any(id(p) in self._shared for p in block.module.parameters())]
        if sharing or self.current.index in self._reached:
            name = sharing[0] if sharing else self.current.name
            raise UserError(
                f"{name} is run twice or shares weights with another layer: set calibration.activations=pruned"
            )
        self._reached.add(self.current.index)
        self._dense = [
            (parameter, parameter.data if self.current.index in self._dropped else parameter.data.clone())
            for parameter in self.current.module.parameters()
        ]

    def _exchange_dense(self) -> None:
        """Puts the dense data into the parameters and keeps the changed data, or the reverse."""
        for i, (parameter, data) in enumerate(self._dense):
            self._dense[i] = (parameter, parameter.data)
            parameter.data = data.to(self.device)

    def _move_home(self) -> None:
        for tensor, home in self._home_data:
            # another block that shares a tensor is reached with these weights
            if self.write_back or id(tensor) in self._shared:
                home.copy_(tensor.data)
            tensor.data = home
        self._home_data = []

    def _leave_block(self) -> None:
        self._dense = []
        self._move_home()
        if self.restore:
            self._dropped.add(self.current.index)
            for parameter in self.current.module.parameters():
                if id(parameter) not in self._shared:
                    parameter.data = torch.empty(0, dtype=parameter.dtype)

    def _offload(self, i: int) -> None:
        """Moves what a paused forward holds to `hidden_device`: the pending arguments, and earlier ones that the model still
        references, such as the embeddings."""
        if self.hidden_device is None:
            return
        offloaded = {key: ref for key, ref in self._offloaded[i].items() if ref() is not None}
        for leaf in tree_leaves((self.forwards[i].args, self.forwards[i].kwargs)):
            if isinstance(leaf, Tensor) and leaf.numel() > SMALL:
                offloaded[id(leaf)] = TensorWeakRef(leaf)
        for ref in offloaded.values():
            tensor = ref()
            if tensor.device != self.hidden_device:
                host = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device=self.hidden_device, pin_memory=tensor.is_cuda
                )
                tensor.data = host.copy_(tensor.data, non_blocking=True)
        self._offloaded[i] = offloaded

    def _load_back(self, i: int) -> None:
        for ref in self._offloaded[i].values():
            if (tensor := ref()) is not None:
                tensor.data = tensor.data.to(self.device, non_blocking=True)


def _converted(arguments: Any, dtype: torch.dtype) -> Any:
    """A copy whose floating-point tensors have the dtype; also those in the dict of keys and values that layers share."""
    arguments = tree_map_only(
        Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, arguments
    )
    return tree_map_only(UserDict, lambda mapping: type(mapping)(_converted(dict(mapping), dtype)), arguments)


def hidden_states(output: Any) -> Tensor:
    """The hidden states in a block's output: its first tensor. Raises `UserError` if there is none."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise UserError(f"the layers return a {type(output).__name__} without a tensor: return a tensor or a tuple")
