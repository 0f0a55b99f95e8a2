"""Plans the memory of a walk: prints what it needs, and chooses the device that holds the hidden states."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline import tasks
from pipeline.engine.blocks import find_blocks, tensors_outside
from pipeline.engine.matrices import Matrix, matrices
from pipeline.runtime import memory, processes

COUNTS = {2: "two", 3: "three", 4: "four"}


def plan_memory(
    model: nn.Module,
    batches: list[Tensor],
    where: str,
    streams: int = 1,
    per_weight: int = 0,
    observe: Callable[[Tensor], Tensor] | None = None,
    copies: int = 0,
    work: str = "train",
) -> torch.device:
    """Prints the memory that a walk needs and what is free. Returns the device that holds the hidden states between layers.

    Each of `streams` (models walked at once) has paused forwards and one loaded layer; on a GPU also the next layer, which is
    read ahead. On a CPU, one more layer is being written.
    Training a layer, or other `work` on it, takes `per_weight` bytes per weight; pruning one needs the sums of `observe` over
    its inputs, and `copies` in float32 of matrices with the same inputs.
    """
    device = processes.device()
    found = find_blocks(model)
    blocks = [block.module for block in found]
    largest = max(blocks, key=memory.size_gib)
    count = 2 * streams if device.type == "cuda" else 1 + streams
    layers = count * memory.size_gib(largest)
    training = per_weight * sum(parameter.numel() for parameter in largest.parameters()) / memory.GIB
    # each once: embeddings may be tied, and layers may share weights
    distinct = {id(tensor): tensor for tensor in tensors_outside(model, found)}
    outside = sum(tensor.nbytes for tensor in distinct.values()) / memory.GIB
    sizes = [tasks.of(model.config).hidden_shape(model, batch) for batch in batches]
    # a paused forward keeps the embeddings as well as the hidden states
    hidden = 2 * streams * sum(count * width for count, width in sizes) * model.dtype.itemsize / memory.GIB
    free, tokens = memory.free_gib(device), max((count for count, _ in sizes), default=0)
    working = _activations_gib(largest, tokens, model.dtype.itemsize, bool(per_weight) and work == "train")
    working *= streams if observe else 1  # the inputs of a second stream's matrices are kept for the first's
    working += _pruning_gib(matrices(found[blocks.index(largest)], found), observe, copies) if observe else 0.0
    needed = layers + training + outside + working
    fits = needed + 1.5 * hidden < 0.8 * free
    hidden_device = (
        device if device.type == "cpu" or where == "gpu" or (where == "auto" and fits) else torch.device("cpu")
    )
    processes.say(
        f"  memory: {memory.text(layers)} for {COUNTS[count]} layers, "
        + (f"{memory.text(training)} to {work} one, " if training else "")
        + f"{memory.text(outside)} outside the layers, {memory.text(working)} to compute with, {memory.text(hidden)} "
        f"of hidden states on the {'GPU' if hidden_device.type == 'cuda' else 'host'}; {memory.text(free)} free"
    )
    if needed + (hidden if hidden_device == device else 0) > free:
        processes.say("  memory: this may not fit: set a smaller batch_size or fewer samples")
    return hidden_device


def _activations_gib(block: nn.Module, tokens: int, itemsize: int, trains: bool) -> float:
    """About what one batch takes inside a block: a few tensors as wide as its widest matrix, one of them in float32; for
    backward also the output of each matrix."""
    shapes = [parameter.shape[-2:] for parameter in block.parameters() if parameter.dim() > 1]
    widest = max((max(shape) for shape in shapes), default=0)
    kept = 2 * sum(shape[0] for shape in shapes) if trains else 0
    return tokens * ((4 * widest + kept) * itemsize + 4 * widest) / memory.GIB


def _pruning_gib(found: dict[str, Matrix], observe: Callable[[Tensor], Tensor], copies: int) -> float:
    """The float64 sums over the inputs of a block's matrices. For matrices with the same inputs also `copies` in float32, and
    for a Gram matrix the six matrices that a factor is made with. Those of one width in one module are taken to share their
    inputs."""
    rows: dict[tuple, int] = defaultdict(int)
    for name, matrix in found.items():
        outputs, inputs = matrix.weight_OI.shape
        rows[name.partition("[")[0].removesuffix(".weight").rpartition(".")[0], matrix.expert, inputs] += outputs
    total = largest = 0
    for (*_, inputs), outputs in rows.items():
        try:
            size = observe(torch.empty(1, inputs, device="meta")).numel()
        except Exception:  # a method of the user's may need real numbers: it is not counted
            return 0.0
        total += 8 * size
        factor = 6 * inputs**2 if size > 3 * inputs else 0
        largest = max(largest, 4 * (factor + copies * outputs * inputs))
    return (total + largest) / memory.GIB
