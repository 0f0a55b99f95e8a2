"""Finds the channels between the matrices of a block that can be permuted without changing what the block computes, and
permutes them.

Such channels are the inputs of one matrix, the fan-in (down_proj, o_proj), and rows of others, its producers (gate_proj and
up_proj; v_proj). Shapes only suggest candidates for these rows (layouts). A candidate is accepted if the block computes the
same in float64 with its channels in a random order.

Shapes: O = out_features, C = inputs of the fan-in, V = channels. C is a multiple of V where query heads share value heads.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.engine.blocks import Block
from pipeline.engine.matrices import Matrix
from pipeline.engine.observe import Observed

EXPERT = re.compile(r"(?<=\[)\d+(?=\])|(?<=experts\.)\d+")
# the largest difference of the outputs that an exact reordering may make, relative to the difference if only the fan-in is
# reordered. Rounding makes 1e-15; wrong heads of an untrained model, whose attention is nearly uniform, made 4e-5
TOLERANCE = 1e-6
OUTPUT_TOLERANCE = 1e-9  # the same, relative to the norm of all outputs of the block
MAX_PRODUCERS = 6  # number of matrices around a fan-in up to which their combinations are tried


@dataclass(frozen=True)
class Layout:
    """Where the channels of a kind of fan-in lie in its producers."""

    producers: dict[str, int]  # kind: number of rows
    channels: int  # V
    head: int  # channels are permuted within runs of this length (a head, or all channels)
    rows: str  # which rows of a producer belong to a channel: "chunks", "interleaved", "last" or "each", see `_rows`


@dataclass(frozen=True)
class Channels:
    """The channels before one matrix."""

    name: str
    fan_in: Matrix
    columns: Tensor  # (C / V, V): the inputs of the fan-in that belong to each channel
    producers: list[tuple[Matrix, Tensor]]  # with the rows of each channel, (rows, V)
    head: int

    def reorder(self, order_V: Tensor) -> None:
        """Puts channel `order_V[i]` at place i, in place."""
        self.reorder_fan_in(order_V)
        self.reorder_producers(order_V)

    def reorder_fan_in(self, order_V: Tensor) -> None:
        _move_(self.fan_in.weight_OI.T, self.columns, order_V)

    def reorder_producers(self, order_V: Tensor) -> None:
        for matrix, rows in self.producers:
            _move_(matrix.weight_OI, rows, order_V)
            if (bias_O := _bias(matrix)) is not None:
                _move_(bias_O, rows, order_V)


def kind(name: str, block: Block) -> str:
    """A matrix's name within its block, the same for all experts."""
    return EXPERT.sub("*", name.removeprefix(f"{block.name}."))


def channels_of(name: str, block: Block, found: dict[str, Matrix], layout: Layout) -> Channels | None:
    """The channels before matrix `name` of a block with the matrices `found`; None if its producers are others."""
    expert, fan_in = EXPERT.search(name), found[name]
    copies = fan_in.weight_OI.shape[1] // layout.channels
    heads = torch.arange(fan_in.weight_OI.shape[1]).view(-1, copies, layout.head)
    producers = []
    for producer, rows in layout.producers.items():
        matrix = found.get(f"{block.name}.{producer.replace('*', expert[0] if expert else '*')}")
        if matrix is None or len(matrix.weight_OI) != rows:
            return None
        producers.append((matrix, _rows(rows, layout)))
    return Channels(name, fan_in, heads.transpose(0, 1).reshape(copies, -1), producers, layout.head)


def layouts(name: str, block: Block, found: dict[str, Matrix], observed: Observed, multiple: int) -> Iterator[Layout]:
    """The layouts that the shapes around matrix `name` allow, the most likely first. Runs are multiples of `multiple`."""
    own, calls = observed.shared_input_key.get(name), list(observed.totals)
    if own is None or list(observed.shared_input_key.values()).count(own) > 1:
        return  # never called, or the other matrices with these inputs would have to be reordered too
    inputs = found[name].weight_OI.shape[1]
    heads = [size for size in _head_sizes(block, inputs) if size % multiple == 0]
    before: list[str] = []
    for near in _surroundings(name, block, found):
        members = [name for name in near if observed.shared_input_key.get(name) in calls[: calls.index(own)]]
        if members == before or len(members) > MAX_PRODUCERS or inputs % multiple:
            continue
        before = members
        rows = {kind(name, block): len(found[name].weight_OI) for name in members}
        equal = [producer for producer, count in rows.items() if count == inputs]
        for count in range(1, len(equal) + 1):
            for chosen in itertools.combinations(equal, count):
                yield Layout(dict.fromkeys(chosen, inputs), inputs, inputs, "chunks")
        for producer, count in rows.items():
            if count > inputs and count % inputs == 0:
                yield from (Layout({producer: count}, inputs, inputs, way) for way in ("chunks", "interleaved"))
        for size, (producer, count) in itertools.product(heads, rows.items()):
            # all rows, or the last of queries, keys and values in one matrix
            values = count if count <= inputs else (count - inputs) // 2
            if values and inputs % values == 0 and values % size == 0:
                ways = ("last",) if values in (count, size) else ("last", "each")
                yield from (Layout({producer: count}, values, size, way) for way in ways)


class Trials:
    """Tests layouts on one block. `call` runs the block on fixed inputs in float64 and returns its outputs and arguments."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.base = self._run()
        self.size = sum(float(tensor[tensor.isfinite()].norm()) for tensor in self.base)  # masks hold infinities

    def keep_output(self, channels: list[Channels]) -> bool:
        """Whether the block computes the same with these channels in a random order: a cheap test of known layouts together."""
        with _reordered(channels):
            return self._difference() < OUTPUT_TOLERANCE * self.size

    def are_exact(self, channels: list[Channels]) -> bool:
        """Whether the block computes the same with these channels in a random order. False, too, if it computes the same with
        only the fan-ins reordered: then their inputs have no influence, and the test shows nothing."""
        with _reordered(channels):
            error = self._difference()
        if not error < TOLERANCE * self.size:
            return False
        with _reordered(channels, fan_ins_alone=True):
            return error <= TOLERANCE * self._difference() > 0

    def _run(self) -> list[Tensor]:
        return [tensor for tensor in _tensors(self.call(), set()) if tensor.is_floating_point()]

    def _difference(self) -> float:
        """NaN if the tensors cannot be compared."""
        now = self._run()
        if [tensor.shape for tensor in now] != [tensor.shape for tensor in self.base]:
            return float("nan")
        pairs = [pair for pair in zip(now, self.base) if not torch.equal(*pair)]
        return sum(float((one - other).double().square().sum()) for one, other in pairs) ** 0.5


@contextmanager
def in_float64(block: Block) -> Iterator[None]:
    """Inside, the block's tensors are copies in float64."""
    before = [(tensor, tensor.data) for tensor in block.tensors() if tensor.is_floating_point()]
    try:
        for tensor, data in before:
            tensor.data = data.to(torch.float64, copy=True)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _move_(tensor: Tensor, places: Tensor, order_V: Tensor) -> None:
    """Moves slices of the first dimension, each row of `places` (rows, V) alike."""
    places, order_V = places.to(tensor.device), order_V.to(tensor.device)
    tensor[places.flatten()] = tensor[places[:, order_V].flatten()]


def _bias(matrix: Matrix) -> Tensor | None:
    if matrix.expert is None:
        bias = getattr(matrix.module, "bias", None)
        return None if bias is None else bias.data
    bias = getattr(matrix.module, f"{matrix.attribute}_bias", None)
    return None if bias is None else bias.data[matrix.expert]


def _rows(count: int, layout: Layout) -> Tensor:
    """The rows of a producer with `count` rows that belong to each channel, (rows of a channel, V).

    chunks: row v of each run of V rows. interleaved: consecutive rows. last: the last V rows, such as the values after queries
    and keys. each: the same within each head, where a head's queries, keys and values are next to each other.
    """
    rows = torch.arange(count)
    if layout.rows == "chunks":
        return rows.view(-1, layout.channels)
    if layout.rows == "interleaved":
        return rows.view(layout.channels, -1).T
    if layout.rows == "last":
        return rows[-layout.channels :].view(1, -1)
    return rows.view(layout.channels // layout.head, -1)[:, -layout.head :].reshape(1, -1)


def _surroundings(name: str, block: Block, found: dict[str, Matrix]) -> Iterator[list[str]]:
    """The other matrices in the modules around a matrix, from the innermost outwards; of a fused one those of its expert."""
    if found[name].expert is not None:
        place = found[name].module, found[name].expert
        yield [other for other, matrix in found.items() if (matrix.module, matrix.expert) == place and other != name]
        return
    path = name
    while path != block.name and (path := path.rpartition(".")[0]):
        inside = [other for other, matrix in found.items() if other.startswith(f"{path}.") and matrix.expert is None]
        yield [other for other in inside if other != name]
        if re.search(r"experts\.\d+$", path):
            return  # around it are the matrices of other experts


def _head_sizes(block: Block, inputs: int) -> list[int]:
    """Possible head sizes, from the attributes and configurations of the block's modules: divisors of `inputs`, largest
    first."""
    modules = list(block.module.modules())
    holders = [*modules, *(module.config for module in modules if hasattr(module, "config"))]
    attributes = [item for holder in holders for item in vars(holder).items()]
    values = {value for key, value in attributes if "head" in key and type(value) is int and value > 0}
    sizes = values | {inputs // value for value in values}
    return sorted((size for size in sizes if 1 < size < inputs and inputs % size == 0), reverse=True)


@contextmanager
def _reordered(channels: list[Channels], fan_ins_alone: bool = False) -> Iterator[None]:
    """Inside, the channels are in a random order, which is the same at each call."""
    generator = torch.Generator().manual_seed(0)
    orders = [_random_order(group, generator) for group in channels]
    moves = [group.reorder_fan_in if fan_ins_alone else group.reorder for group in channels]
    for move, order_V in zip(moves, orders):
        move(order_V)
    try:
        yield
    finally:
        for move, order_V in zip(moves, orders):
            move(order_V.argsort())


def _random_order(channels: Channels, generator: torch.Generator) -> Tensor:
    heads = channels.columns.shape[1] // channels.head
    order = torch.rand(heads, channels.head, generator=generator).argsort(1)
    return (order + channels.head * torch.arange(heads)[:, None]).flatten()


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in a structure: also those that a block leaves in its arguments for later blocks, such as shared values."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, nn.Module | type):
            seen.add(id(leaf))
            if isinstance(leaf, Mapping):
                yield from _tensors(list(leaf.values()), seen)
            elif hasattr(leaf, "__dict__"):
                yield from _tensors(list(vars(leaf).values()), seen)
