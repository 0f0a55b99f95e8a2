"""Measures each dense block's share of outlying scores, from which OWL allots the ratios."""

from lightning.pytorch import Callback

from pipeline.engine.matrices import matrices
from pipeline.pruning import scores
from pipeline.runtime import processes


class OutlierShares(Callback):
    """`shares` holds, by the block's index, the share of Wanda scores above `times` the block's mean."""

    def __init__(self, times: float) -> None:
        self.times = times
        self.shares: dict[int, float] = {}

    def on_predict_batch_end(self, trainer, walk, outputs, block, number: int, dataloader_idx: int = 0) -> None:
        found = matrices(block, walk.blocks)
        observed = walk.observe(found, scores.square_sum)
        known = [
            scores.wanda(found[name].weight_OI, observed.totals[key]) for name, key in observed.shared_input_key.items()
        ]
        if not known:
            return
        self.shares[block.index] = scores.outlier_share(known, self.times)
        processes.say(
            f"  layer {block.index + 1}/{len(walk.blocks)}: {self.shares[block.index]:.4%} of the scores are outliers"
        )
