"""Measures each dense layer's share of outlying scores, from which OWL allots the ratios."""

from lightning.pytorch import Callback
from torch import nn

from pipeline import processes, scores
from pipeline.decoder import matrices
from pipeline.watch import InputWatch


class OutlierShares(Callback):
    """`shares` holds, by layer, the share of Wanda scores above `times` the layer's mean."""

    def __init__(self, times: float) -> None:
        self.times = times
        self.shares: list[float] = []

    def on_predict_batch_start(self, trainer, walk, layer: nn.Module, index: int, dataloader_idx: int = 0) -> None:
        walk.watch = InputWatch(matrices(layer), scores.square_sum)

    def on_predict_batch_end(self, trainer, walk, outputs, layer, index: int, dataloader_idx: int = 0) -> None:
        watch, walk.watch = walk.watch, None
        watch.close()
        leaders = {name: watch.leader_of(name) for name in matrices(layer)}
        # in the order of the matrices, for that in which experts are reached differs from rank to rank
        totals = {leader: processes.all_sum(watch.totals[leader]) for leader in dict.fromkeys(leaders.values())}
        found = [scores.wanda(m.weight_OI, totals[leaders[name]]) for name, m in matrices(layer).items()]
        self.shares.append(scores.outlier_share(found, self.times))
        processes.say(
            f"  layer {index + 1}/{len(walk.decoder.layers)}: {self.shares[-1]:.4%} of the scores are outliers"
        )
