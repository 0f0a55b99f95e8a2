"""The sums over a matrix's inputs that several steps of pruning share.

Shapes: I = in_features, N = tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.pruning import gram, scores

SQUARE_SUM, MOMENTS, GRAM = "square_sum", "moments", "gram"
OBSERVE: dict[str, Callable[[Tensor], Tensor]] = {
    SQUARE_SUM: scores.square_sum,
    MOMENTS: scores.moments,
    GRAM: gram.packed,
}


@dataclass
class Statistics:
    """Sums over all tokens. `square_sum_I` is derived from the moments or the Gram matrix if those are summed. `moments_3I` and
    `gram_II` (fp32) are None if no step needs them. `raw`: the observed sums by name."""

    square_sum_I: Tensor
    moments_3I: Tensor | None = None
    gram_II: Tensor | None = None
    raw: dict[str, Tensor] = field(default_factory=dict)


class Sums:
    """Packs all sums in `needs` into one flat vector, because `LayerWalk.observe` sums one tensor per matrix."""

    def __init__(self, needs: set[str]) -> None:
        self.needs = [name for name in (GRAM, MOMENTS) if name in needs] or [SQUARE_SUM]

    def observe(self, input_NI: Tensor) -> Tensor:
        return torch.cat([OBSERVE[name](input_NI).flatten() for name in self.needs])

    def read(self, total: Tensor, inputs: int) -> Statistics:
        """`total`: the sum of `observe` over all tokens, in float64; `inputs`: I."""
        lengths = {SQUARE_SUM: inputs, MOMENTS: 3 * inputs, GRAM: gram.packed_length(inputs)}
        raw = dict(zip(self.needs, total.split([lengths[name] for name in self.needs])))
        moments_3I = raw[MOMENTS].view(3, inputs) if MOMENTS in raw else None
        gram_II = gram.unpacked(raw[GRAM], inputs) if GRAM in raw else None
        if gram_II is not None:
            square_sum_I = gram_II.diagonal().clone()
        else:
            square_sum_I = raw[SQUARE_SUM] if moments_3I is None else moments_3I[0]
        return Statistics(square_sum_I, moments_3I, gram_II, raw)
