"""Comparisons of a walk with the model's own forward, for the tests and for `benchmarks/models.py`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.engine.blocks import find_blocks
from pipeline.engine.layerwise import LayerwiseForwards


@torch.no_grad()
def difference(model: nn.Module, batches: list[Tensor], device: torch.device | None = None) -> str | None:
    """Where a walk differs from the model's own forward in any bit; each block runs once extra before it is advanced. `device`:
    where the blocks compute; the model and the batches must be there."""
    expected = [model(input_ids=batch, use_cache=False).logits for batch in batches]
    differences: list[str] = []
    results: list[Tensor] = []

    def see(i: int, hidden: Tensor) -> None:
        if not same(hidden, tried[i]):
            differences.append(f"{walk.current.name} run twice on batch {i} gave different hidden states")

    def call(batch: Tensor) -> Tensor:
        return model(input_ids=batch, use_cache=False).logits

    with LayerwiseForwards(model, find_blocks(model), call, batches, device or torch.device("cpu")) as walk:
        walk.start()
        while walk.current is not None:
            tried = [walk.run_block(i) for i in range(len(batches))]
            results += walk.advance(see)
    differences += [
        f"logits of batch {i}: {apart(given, own)}"
        for i, (given, own) in enumerate(zip(results, expected))
        if not same(given, own)
    ]
    if len(results) != len(batches):
        differences.append(f"{len(results)} results of {len(batches)} batches")
    return differences[0] if differences else None


def given(args: Any, kwargs: Any) -> list[Tensor]:
    """A copy of the tensors in a call's arguments."""
    return [leaf.detach().clone() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


@torch.no_grad()
def own_calls(model: nn.Module, batch: Tensor) -> dict[int, list[Tensor]]:
    """The arguments of each block's first call in the model's own forward, by the block's index."""
    calls: dict[int, list[Tensor]] = {}
    hooks = []
    for block in find_blocks(model):

        def see(module, args, kwargs, index=block.index):
            if index not in calls:
                calls[index] = given(args, kwargs)

        hooks.append(block.module.register_forward_pre_hook(see, with_kwargs=True))
    model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def same(one: Tensor, other: Tensor) -> bool:
    """Bitwise equality, with NaN equal to NaN."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    )


def apart(one: Tensor, other: Tensor) -> str:
    """The largest difference of two tensors, relative to the largest value."""
    if one.shape != other.shape:
        return f"shape {tuple(one.shape)}, not {tuple(other.shape)}"
    return f"{relative(one, other):.0e}"


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30))
