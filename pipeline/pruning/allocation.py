"""Which pattern each matrix is given: the recipe's everywhere, by layer with OWL, and what the recipe says by name."""

from fnmatch import fnmatch

from pipeline.engine.blocks import Block
from pipeline.engine.matrices import matrices
from pipeline.pruning import scores
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Prune
from pipeline.sparsity import patterns
from pipeline.sparsity.patterns import Pattern, Unstructured


def allocate(blocks: list[Block], settings: Prune, shares: dict[int, float] | None = None) -> dict[str, Pattern]:
    """Pattern by parameter name; a matrix that stays dense is not there.

    `shares` are the outlier shares for OWL by the block's index. `prune.overrides` maps a glob over parameter names to a
    pattern or to `dense`; the last one that matches counts. `UserError` where a pattern cannot hold or a glob matches nothing.
    """
    usual = patterns.parse(settings.sparsity)
    by_block: dict[int, Pattern] = {}
    if shares is not None:
        ratios = scores.owl_ratios(list(shares.values()), usual.ratio, settings.owl_spread)
        by_block = {i: Unstructured(min(max(ratio, 0.0), 0.99)) for i, ratio in zip(shares, ratios)}
    named = {
        name: (by_block.get(block.index, usual), matrix.weight_OI.shape[1])
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
            raise UserError(f"prune.sparsity={pattern}: {name} has {problem}; a ratio such as 0.5 always can")
        chosen[name] = pattern
    for glob in settings.overrides:
        if not any(fnmatch(name, glob) for name in named):
            raise UserError(f"prune.overrides: nothing is called '{glob}'; a name is such as {next(iter(named))}")
    if not chosen:
        raise UserError("prune.overrides leave every matrix dense: there is nothing to prune")
    return chosen
