"""The visitor of `run_layerwise` that measures each dense block for an allocation."""

from pipeline.engine.blocks import Block
from pipeline.engine.matrices import matrices
from pipeline.engine.walk import LayerWalk
from pipeline.pruning.allocation import Allocation
from pipeline.pruning.block_pruner import check_inputs
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.runtime.readings import Readings
from pipeline.runtime.user_code import unchanged


class BlockMeasure:
    """Collects `allocation.measure` of each block in `measured`, by the block's index."""

    def __init__(self, allocation: Allocation) -> None:
        self.allocation = allocation
        self.measured: dict[int, float] = {}

    def __call__(self, walk: LayerWalk, block: Block) -> None:
        block_matrices = matrices(block, walk.blocks)
        observed = walk.observe(block_matrices, self.allocation.observe)
        weights = {name: block_matrices[name].weight_OI for name in observed.shared_input_key}
        totals = {name: observed.totals[key] for name, key in observed.shared_input_key.items()}
        with Readings() as readings:
            for name, weight_OI in weights.items():
                check_inputs(readings, {name: weight_OI}, totals[name])
        if weights:
            label = type(self.allocation).__name__
            with unchanged(f"{label}.measure", **weights):
                found = self.allocation.measure(weights, totals)
            try:
                self.measured[block.index] = value = float(found)
            except (TypeError, ValueError, RuntimeError):  # torch raises the last for more than one number
                raise UserError(f"{label}.measure returned {found}: return a number") from None
            processes.say(f"  layer {block.index + 1}/{len(walk.blocks)}: {label} measured {value:.4g}")
