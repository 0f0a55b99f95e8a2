"""Runs a model block by block: its own forward, once for each batch, paused whenever it reaches a block. Pure torch.

Nothing is known of how a model calls its blocks, so arguments that differ by token, state that blocks share, blocks that are
called twice and outputs of any form all work. A greenlet keeps to one thread, so device, stream and autocast stay as they are.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import TensorWeakRef
from transformers import Cache

from pipeline.engine.blocks import Block, outside, shared_parameters
from pipeline.runtime.errors import UserError

SMALL = 4096  # numbers; smaller arguments, such as the scale of a position, are not worth a move to the host


class PausedForward(greenlet):
    """One call of a model. It pauses at each block, with the `index`, `args` and `kwargs` of the call that the model wants
    to make; `index` is None once the model has returned `result`."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self.call = call
        self.index: int | None = None
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}
        self.result: Any = None
        self._grad = False

    def run(self, *_: Any) -> None:
        self.result = self.call()

    def resume(self, output: Any = None) -> None:
        """Runs on to the next block, given what the last one returned."""
        outer = torch.is_grad_enabled()
        torch.set_grad_enabled(self._grad)  # the mode is the thread's, and the model may have set one of its own
        try:
            self.index, self.args, self.kwargs = self.switch(output) or (None, (), {})
        finally:
            self._grad = torch.is_grad_enabled()
            torch.set_grad_enabled(outer)


def _pausing(index: int, forward: Callable) -> Callable:
    """The forward of a block: it pauses a `PausedForward`, and runs as ever for anybody else."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        running = getcurrent()
        if isinstance(running, PausedForward):
            return running.parent.switch((index, args, kwargs))
        return forward(*args, **kwargs)

    return call


class LayerwiseForwards:
    """The forwards of one model over several batches, all paused at the same block, `at` (None at the end).

    `call(batch)` calls the model. Blocks come to `device` when they are reached. `store` is where the arguments of a paused
    forward wait (None: where they are). `restore(block)`, where given, gives a block its weights: those in `elsewhere` have
    other weights than the model was loaded with, and any block's are dropped once it has been passed, for a visitor may have
    changed them. Without it they stay as they were, unless `keeps`: then what a visitor changed is written to where a block
    came from.
    A context manager: within, the blocks' own `forward` is replaced; at its end all that it moved is where it was.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        call: Callable[[Tensor], Any],
        batches: Iterable[Tensor],
        device: torch.device,
        store: torch.device | None = None,
        restore: Callable[[Block], None] | None = None,
        elsewhere: Iterable[int] = (),
        keeps: bool = False,
    ) -> None:
        self.model, self.blocks, self.call, self.batches = model, blocks, call, list(batches)
        self.device, self.restore, self.keeps = device, restore, keeps
        self.store = None if store == device else store
        self.at: Block | None = None
        self.forwards: list[PausedForward] = []
        self._parked: list[dict[int, TensorWeakRef]] = [{} for _ in self.batches]
        self._shared = shared_parameters(blocks)
        self._dropped = set(elsewhere)
        self._home: list[tuple[Tensor, Tensor]] = []  # tensors of the block at hand, and their data where it came from
        self._outside: list[tuple[Tensor, Tensor]] = []  # the same of what no block holds

    def __enter__(self) -> "LayerwiseForwards":
        for tensor in outside(self.model, self.blocks):
            if tensor.device != self.device:
                self._outside.append((tensor, tensor.data))
                tensor.data = tensor.data.to(self.device)
        # the model's own call runs a block's hooks before it pauses and after it goes on, so here only forward is called
        self._own = [block.module.forward for block in self.blocks]
        for block, own in zip(self.blocks, self._own):
            block.module.forward = _pausing(block.index, own)
        return self

    def __exit__(self, *_: Any) -> None:
        for block, own in zip(self.blocks, self._own):
            del block.module.forward
            if block.module.forward != own:  # an object's own, as accelerate's hooks set
                block.module.forward = own
        outer = torch.is_grad_enabled()
        for forward in self.forwards:
            if forward:  # paused: its frames would keep their tensors until they are collected
                forward.throw()
        torch.set_grad_enabled(outer)  # as those that ended have left their own mode
        self.forwards = []
        self._go_home()  # the last block, or one in which a fault ended the walk
        for tensor, home in self._outside:
            tensor.data = home
        self._outside = []

    @torch.no_grad()
    def start(self) -> None:
        """Runs all forwards to their first block."""
        self.forwards = [PausedForward(functools.partial(self.call, batch.to(self.device))) for batch in self.batches]
        for i, forward in enumerate(self.forwards):
            forward.resume()
            self._put_away(i)
        self._arrive()

    def try_on(self, i: int) -> Tensor:
        """The hidden states that the block at hand gives for batch i. May be repeated, for it changes nothing: neither tensors
        nor lists and dicts among its arguments. (An object of the model's own that a block changes would see it twice.)"""
        self._bring_back(i)
        forward = self.forwards[i]
        # aliases: a gradient may need them when the originals have been put away
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (forward.args, forward.kwargs))
        kwargs = {k: copy.deepcopy(v) if isinstance(v, Cache) else v for k, v in kwargs.items()}  # XLM always has one
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in given]
        try:
            return hidden_states(self._own[self.at.index](*args, **kwargs))
        except StopIteration as error:  # Lightning would take it for the end of the data, and end the walk in silence
            raise UserError(f"{self.at.name} raises StopIteration in its forward, which its code must not") from error
        finally:
            self._put_away(i)
            if versions != [tensor._version for tensor in given]:
                raise UserError(f"{self.at.name} changes its inputs in place, so it cannot be tried before it is run")

    @torch.no_grad()
    def advance(self, see: Callable[[int, Tensor], None] | None = None) -> Iterator[Any]:
        """Runs the block at hand for good, and the model on to the next one; yields the results of forwards that end there.

        `see` is given each batch's number and hidden states. The iterator must be exhausted.
        """
        for i, forward in enumerate(self.forwards):
            self._bring_back(i)
            output = self._own[self.at.index](*forward.args, **forward.kwargs)
            if see:
                see(i, hidden_states(output))
            forward.args, forward.kwargs = (), {}
            forward.resume(output)
            del output
            self._put_away(i)
            if forward.index is None:
                yield forward.result
                forward.result = None
        self._leave()
        self._arrive()

    def results(self, reached: Callable[[Block], None] = lambda block: None) -> Iterator[Any]:
        """What the model gives for each batch, in their order; `reached` hears of each block before it is run."""
        self.start()
        while self.at is not None:
            reached(self.at)
            yield from self.advance()

    def _arrive(self) -> None:
        reached = {forward.index for forward in self.forwards}
        if len(reached) > 1:
            names = sorted("the end" if index is None else self.blocks[index].name for index in reached)
            raise UserError(
                f"the batches take different ways through the model: one is at {names[0]}, one at {names[1]}"
            )
        index = next(iter(reached), None)
        self.at = None if index is None else self.blocks[index]
        if self.at is None:
            return
        if index in self._dropped:
            self.restore(self.at)
            self._dropped.discard(index)
        for tensor in self.at.tensors():
            if tensor.device != self.device:
                self._home.append((tensor, tensor.data))
                tensor.data = tensor.data.to(self.device, non_blocking=True)

    def _go_home(self) -> None:
        for tensor, home in self._home:
            if self.keeps or id(tensor) in self._shared:  # a block that shares it will come to it with these weights
                home.copy_(tensor.data)
            tensor.data = home
        self._home = []

    def _leave(self) -> None:
        self._go_home()
        if self.restore:
            self._dropped.add(self.at.index)
            for parameter in self.at.module.parameters():
                if id(parameter) not in self._shared:
                    parameter.data = torch.empty(0, dtype=parameter.dtype)

    def _put_away(self, i: int) -> None:
        """Moves what a paused forward holds to `store`: the arguments of its call, and those of earlier calls that the model
        still refers to, such as the embeddings."""
        if self.store is None:
            return
        parked = {key: ref for key, ref in self._parked[i].items() if ref() is not None}
        for leaf in tree_leaves((self.forwards[i].args, self.forwards[i].kwargs)):
            if isinstance(leaf, Tensor) and leaf.numel() > SMALL:
                parked[id(leaf)] = TensorWeakRef(leaf)
        for ref in parked.values():
            tensor = ref()
            if tensor.device != self.store:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.store, pin_memory=tensor.is_cuda)
                tensor.data = host.copy_(tensor.data, non_blocking=True)
        self._parked[i] = parked

    def _bring_back(self, i: int) -> None:
        for ref in self._parked[i].values():
            if (tensor := ref()) is not None:
                tensor.data = tensor.data.to(self.device, non_blocking=True)


def hidden_states(output: Any) -> Tensor:
    """The hidden states among what a block returns: the first tensor of it; `UserError` where none is found."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise UserError(
        f"the layers return a {type(output).__name__}, in which no tensor is found: return a tensor or a tuple"
    )
