"""The pattern of each matrix: `prune.sparsity`, modified per layer by an allocation and per name by `prune.overrides`."""

import re
from collections.abc import Callable
from fnmatch import fnmatch

import torch
from torch import Tensor

from pipeline.engine.blocks import Block
from pipeline.engine.matrices import matrices
from pipeline.pruning import gram, scores
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Prune
from pipeline.sparsity import patterns
from pipeline.sparsity.patterns import Pattern, Unstructured

LARGEST = 0.99  # ratio of a layer
EXPERT = re.compile(r"\[([\d*?]+)\]$")  # the number of an expert, or its wildcard, at the end of a glob


class Allocation:
    """Distributes the sparsity over the layers. If a subclass defines `measure`, it is first called on each layer of the dense
    model. A subclass in a user's file may set `label`, `description` and `citation` for checks and reports."""

    # (weights (O, I) by name, sums of the observed inputs by name) of a dense layer -> a number
    measure: Callable[[dict[str, Tensor], dict[str, Tensor]], float] | None = None

    def __init__(self, settings: Prune) -> None:
        self.settings = settings
        self.sizes: list[int] | None = None  # number of weights of each layer; set before `ratios` is called

    def observe(self, input_NI: Tensor) -> Tensor:
        """The statistic to sum over a matrix's inputs, for `measure`. Default: the square sum of each feature, (I,)."""
        return scores.square_sum(input_NI)

    def ratios(self, measured: list[float | None], ratio: float) -> list[float]:
        """The share of weights to prune in each layer, `ratio` on average. `measured`: the results of `measure` by layer."""
        raise NotImplementedError


class Uniform(Allocation):
    """The recipe's pattern in all layers; `ratios` is never called."""


class Spread(Allocation):
    """The larger the measured value, the less is pruned. Ratios differ by at most twice the setting that `spread` names."""

    spread = "allocation_spread"

    def ratios(self, measured: list[float], ratio: float) -> list[float]:
        if ratio > LARGEST:
            raise UserError(
                f"prune.allocation={self.settings.allocation} gives no layer a ratio above {LARGEST}, and prune.sparsity="
                f"{ratio:g} is the mean: set prune.sparsity={LARGEST} or less, or prune.allocation=uniform"
            )
        spread = getattr(self.settings, self.spread)
        found = scores.spread_ratios(measured, ratio, spread, self.sizes)
        low, high = min(found), max(found)
        if low < 0 or high > LARGEST:  # cut off, they would no longer have the recipe's ratio on average
            fits = spread * min(ratio / max(ratio - low, 1e-9), (LARGEST - ratio) / max(high - ratio, 1e-9))
            raise UserError(
                f"prune.allocation={self.settings.allocation} gives the layers ratios from {low:.3f} to {high:.3f}, which "
                f"must be from 0 to {LARGEST}: set prune.{self.spread}={max(0, int(fits * 1000)) / 1000:g} or less"
            )
        return found


class Owl(Spread):
    """Outlier weighed layerwise sparsity (Yin et al. 2024): layers with more outlying scores are pruned less."""

    spread = "owl_spread"

    def measure(self, weights: dict[str, Tensor], totals: dict[str, Tensor]) -> float:
        layer_scores = [scores.wanda(weight_OI, totals[name]) for name, weight_OI in weights.items()]
        return scores.outlier_share(layer_scores, self.settings.owl_outliers)


class AlphaPruning(Spread):
    """Layers whose spectra have lighter tails, a sign of less training, are pruned more (Lu et al. 2024)."""

    def measure(self, weights: dict[str, Tensor], totals: dict[str, Tensor]) -> float:
        return sum(scores.tail_exponent(weight_OI) for weight_OI in weights.values()) / len(weights)

    def ratios(self, measured: list[float], ratio: float) -> list[float]:
        return super().ratios([-value for value in measured], ratio)


class LayerError(Spread):
    """Layers whose outputs change more under Wanda at the recipe's ratio are pruned less."""

    def observe(self, input_NI: Tensor) -> Tensor:
        return gram.packed(input_NI)

    def measure(self, weights: dict[str, Tensor], totals: dict[str, Tensor]) -> float:
        errors = []
        pattern = patterns.parse(self.settings.sparsity)
        for name, weight_OI in weights.items():
            gram_II = gram.unpacked(totals[name], weight_OI.shape[1])
            weight_OI = weight_OI.float()
            lost_OI = weight_OI.masked_fill(pattern.select(scores.wanda(weight_OI, gram_II.diagonal())), 0)
            lost, total = (((matrix @ gram_II) * matrix).sum().item() for matrix in (lost_OI, weight_OI))
            errors.append((lost / max(total, torch.finfo(torch.float32).tiny)) ** 0.5)
        return sum(errors) / len(errors)


def patterns_by_layer(
    allocation: Allocation, blocks: list[Block], measured: dict[int, float], ratio: float
) -> dict[int, Pattern]:
    """The pattern of each block, by its index, such that `ratio` is the mean over the weights without an override. `measured`:
    the results of `allocation.measure` by index, if it has one.

    Raises `UserError` if a user's allocation does not return a ratio per block."""
    overrides = allocation.settings.overrides
    sizes = {
        block.index: sum(
            matrix.weight_OI.numel()
            for name, matrix in matrices(block, blocks).items()
            if not any(matches(name, glob) for glob in overrides)
        )
        for block in blocks
    }
    indices = [index for index in (measured if allocation.measure else sizes) if sizes[index]]
    if not indices:  # the walk reports a model that calls none of its layers
        return {}
    allocation.sizes = [sizes[index] for index in indices]
    returned = allocation.ratios([measured.get(index) for index in indices], ratio)
    try:
        ratios = [float(value) for value in returned]
    except (TypeError, ValueError):
        ratios = []
    if len(ratios) != len(indices) or not all(0 <= value <= LARGEST for value in ratios):
        raise UserError(
            f"{type(allocation).__name__}.ratios returned {returned}: return {len(indices)} numbers from 0 to {LARGEST}"
        )
    return {index: Unstructured(value) for index, value in zip(indices, ratios)}


def matches(name: str, glob: str) -> bool:
    """Whether a glob of `prune.overrides` matches a matrix's name. At the end, `[3]` and `[*]` are an expert's number, as in
    the name, and no set of characters."""
    return fnmatch(name, EXPERT.sub(r"[[]\1]", glob))


def allocate(blocks: list[Block], settings: Prune, by_block: dict[int, Pattern] | None = None) -> dict[str, Pattern]:
    """The pattern of each matrix by parameter name, without those that stay dense.

    `by_block`: the result of `patterns_by_layer`; blocks without an entry have the recipe's pattern. `prune.overrides` maps
    globs over parameter names to a pattern or to `dense`; the last match counts. Raises `UserError` if a pattern does not
    fit a matrix, a glob matches nothing, or experts are to be pruned with `prune.target=dense`.
    """
    default = patterns.parse(settings.sparsity)
    candidates = {
        name: ((by_block or {}).get(block.index, default), matrix)
        for block in blocks
        for name, matrix in matrices(block, blocks).items()
    }
    if not candidates:
        raise UserError("the layers hold no matrix that can be pruned: this model is not supported")
    overrides = {  # parsed once each, so that the matrices of an override share a pattern
        glob: None if value == "dense" else patterns.parse(value, f"prune.overrides[{glob}]")
        for glob, value in settings.overrides.items()
    }
    allocated = {}
    for name, (pattern, matrix) in candidates.items():
        for glob in overrides:
            if matches(name, glob):
                pattern = overrides[glob]
        if pattern is None:
            continue
        if settings.target == "dense" and matrix.routed:
            raise UserError(
                f"prune.target=dense: {name} belongs to an expert, which gets other tokens in the dense model: set "
                "prune.target=pruned, or such names to dense in prune.overrides"
            )
        if problem := pattern.misfit(matrix.weight_OI.shape[1]):
            raise UserError(f"prune.sparsity={pattern}: {name}: {problem}; set a ratio such as 0.5, which always fits")
        allocated[name] = pattern
    for glob in overrides:
        if not any(matches(name, glob) for name in candidates):
            raise UserError(f"prune.overrides: no matrix matches '{glob}': use names such as {next(iter(candidates))}")
    if not allocated:
        raise UserError("prune.overrides leaves every matrix dense: there is nothing to prune")
    return allocated
