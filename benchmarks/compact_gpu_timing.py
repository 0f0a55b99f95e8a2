"""Compact matrices in the GPU's memory, and their times: for compact_gpu.py."""

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.compact.compact_weight import CompactWeight
from pipeline.compact.file_format import compress
from pipeline.compact.gpu_weight import GpuWeight, SemiStructuredWeight
from pipeline.sparsity.patterns import parse

FORMS = ("dense", "bitmask", "bitmask int8", "semi-structured")
REPLAYS = 5


@functools.cache
def matrix(rows: int, columns: int, pattern: str, values: str = "exact") -> GpuWeight:
    weight = torch.randn(rows, columns, device="cuda") * columns**-0.5
    mask = parse(pattern).select(weight.abs())
    weight = torch.where(mask, weight, 0.0).bfloat16()
    packed = compress("w", weight.cpu(), mask.cpu(), False, (pattern,), values)
    return GpuWeight.from_cpu(CompactWeight.from_compact(packed, torch.bfloat16), torch.device("cuda", 0))


def another(weight: CompactWeight | Tensor) -> CompactWeight | Tensor:
    """The same in memory of its own."""
    if isinstance(weight, Tensor):
        return weight.clone()
    if isinstance(weight, SemiStructuredWeight):
        return SemiStructuredWeight(weight._rows(0, weight.rows).contiguous(), weight.transposed)
    found = copy.copy(weight)
    for name, value in vars(weight).items():
        if isinstance(value, Tensor):
            setattr(found, name, value.clone())
    return found


def linear(weight: CompactWeight | Tensor) -> Callable[[Tensor], Tensor]:
    return weight.linear if isinstance(weight, CompactWeight) else lambda x: F.linear(x, weight)


def graph_seconds(call: Callable[[], object], replays: int = REPLAYS) -> float:
    """The median time of a captured call. Raises `RuntimeError` if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(next_) for one, next_ in itertools.pairwise(events)) / 1e3


def call_seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """The median time of a call with its launches, until the GPU has finished."""
    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def forms_of(rows: int, columns: int, pattern: str) -> Iterator[tuple[str, CompactWeight | Tensor]]:
    weight = matrix(rows, columns, pattern)
    dense = weight.dense()
    yield "dense", dense
    yield "bitmask", weight
    if pattern == "0.5":
        yield "bitmask int8", matrix(rows, columns, pattern, "int8")
    if weight.is_2_of_4():
        try:
            yield "semi-structured", SemiStructuredWeight(dense, False)
        except (RuntimeError, NotImplementedError) as error:
            print(f"no semi-structured form: {str(error).splitlines()[0][:200]}")
