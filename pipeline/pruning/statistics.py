"""What is summed over the inputs of a matrix when several steps of pruning each need something.

Shapes: I = in_features, N = tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.pruning import obs, scores

SQUARE_SUM, MOMENTS, GRAM = "square_sum", "moments", "gram"
OBSERVE: dict[str, Callable[[Tensor], Tensor]] = {
    SQUARE_SUM: scores.square_sum,
    MOMENTS: scores.moments,
    GRAM: obs.hessian,
}


@dataclass
class Statistics:
    """Sums over all tokens. The square sum, (I,), is taken from the richest sum; `moments_3I` and `gram_II` (fp32) are None if
    no step needs them. `raw`: the sums as observed, by name."""

    square_sum_I: Tensor
    moments_3I: Tensor | None = None
    gram_II: Tensor | None = None
    raw: dict[str, Tensor] = field(default_factory=dict)


class Sums:
    """One flat vector that holds all sums in `needs`, as `LayerWalk.observe` adds up one tensor for a matrix."""

    def __init__(self, needs: set[str]) -> None:
        self.needs = [name for name in (GRAM, MOMENTS) if name in needs] or [SQUARE_SUM]

    def observe(self, input_NI: Tensor) -> Tensor:
        return torch.cat([OBSERVE[name](input_NI).flatten() for name in self.needs])

    def read(self, total: Tensor, inputs: int) -> Statistics:
        """`total`: the sum of `observe` over all tokens, in float64; `inputs`: I."""
        lengths = {SQUARE_SUM: inputs, MOMENTS: 3 * inputs, GRAM: obs.packed_length(inputs)}
        found = dict(zip(self.needs, total.split([lengths[name] for name in self.needs])))
        moments_3I = found[MOMENTS].view(3, inputs) if MOMENTS in found else None
        gram_II = obs.unpacked(found[GRAM].float(), inputs) if GRAM in found else None
        if gram_II is not None:
            square_sum_I = gram_II.diagonal().clone()
        else:
            square_sum_I = found[SQUARE_SUM] if moments_3I is None else moments_3I[0]
        return Statistics(square_sum_I, moments_3I, gram_II, found)
