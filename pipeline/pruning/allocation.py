"""Which pattern each matrix is given: the recipe's, by layer as an allocation says, and what the recipe says by name."""

from collections.abc import Callable
from fnmatch import fnmatch

from torch import Tensor

from pipeline.engine.blocks import Block
from pipeline.engine.matrices import matrices
from pipeline.pruning import scores
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Prune
from pipeline.sparsity import patterns
from pipeline.sparsity.patterns import Pattern, Unstructured


class Allocation:
    """Shares out a ratio over the layers. One that looks at the dense model first has a `measure`; then a walk through
    the model calls it for each layer. In a file of the user's, its attributes `label`, `description` and `citation` say what
    it is called in checks and reports."""

    # (weights (O, I) by name, what was observed of each one's inputs) of a dense layer -> a number
    measure: Callable[[dict[str, Tensor], dict[str, Tensor]], float] | None = None

    def __init__(self, settings: Prune) -> None:
        self.settings = settings

    def observe(self, input_NI: Tensor) -> Tensor:
        """What to sum over the inputs of a matrix, for `measure`. Default: the square sum of each feature, (I,)."""
        return scores.square_sum(input_NI)

    def ratios(self, measured: list[float | None], ratio: float) -> list[float]:
        """The share that goes of each layer, `ratio` on the average; `measured` has what `measure` found of each."""
        raise NotImplementedError


class Uniform(Allocation):
    """Never asked for ratios: the recipe's pattern holds in all layers."""


class Owl(Allocation):
    """Outlier weighed layerwise sparsity (Yin et al. 2024): the more outlying scores, the less is pruned."""

    def measure(self, weights: dict[str, Tensor], totals: dict[str, Tensor]) -> float:
        found = [scores.wanda(weight_OI, totals[name]) for name, weight_OI in weights.items()]
        return scores.outlier_share(found, self.settings.owl_outliers)

    def ratios(self, measured: list[float], ratio: float) -> list[float]:
        return scores.owl_ratios(measured, ratio, self.settings.owl_spread)


def patterns_by_layer(
    allocation: Allocation, blocks: list[Block], measured: dict[int, float], ratio: float
) -> dict[int, Pattern]:
    """A pattern by the block's index; `measured` has what the allocation measured, where it does. `UserError` where an
    allocation of the user's own gives no ratios."""
    places = list(measured) if allocation.measure else [block.index for block in blocks]
    if not places:  # the model calls none of its layers: the walk will say so
        return {}
    ratios = list(allocation.ratios([measured.get(index) for index in places], ratio))
    if len(ratios) != len(places) or not all(isinstance(it, int | float) and it == it for it in ratios):
        raise UserError(f"{type(allocation).__name__}.ratios gave {ratios}: it should give {len(places)} numbers")
    return {index: Unstructured(min(max(float(it), 0.0), 0.99)) for index, it in zip(places, ratios)}


def allocate(blocks: list[Block], settings: Prune, by_block: dict[int, Pattern] | None = None) -> dict[str, Pattern]:
    """Pattern by parameter name; a matrix that stays dense is not there.

    `by_block` has the patterns of `by_layer`, where the recipe's does not hold for all. `prune.overrides` maps a glob over
    parameter names to a pattern or to `dense`; the last one that matches counts. `UserError` where a pattern cannot hold or
    a glob matches nothing.
    """
    usual = patterns.parse(settings.sparsity)
    named = {
        name: ((by_block or {}).get(block.index, usual), matrix.weight_OI.shape[1])
        for block in blocks
        for name, matrix in matrices(block, blocks).items()
    }
    instead = {  # each once, so that matrices of one override share a pattern
        glob: None if value == "dense" else patterns.parse(value, f"prune.overrides[{glob}]")
        for glob, value in settings.overrides.items()
    }
    chosen = {}
    for name, (pattern, inputs) in named.items():
        for glob in instead:
            if fnmatch(name, glob):
                pattern = instead[glob]
        if pattern is None:
            continue
        if problem := pattern.misfit(inputs):
            raise UserError(f"prune.sparsity={pattern}: {name}: {problem}; set a ratio such as 0.5, which always fits")
        chosen[name] = pattern
    for glob in settings.overrides:
        if not any(fnmatch(name, glob) for name in named):
            raise UserError(f"prune.overrides: nothing is called '{glob}'; a name is such as {next(iter(named))}")
    if not chosen:
        raise UserError("prune.overrides leave every matrix dense: there is nothing to prune")
    return chosen
