"""Writes each finished block, so that a killed run goes on where it stopped."""

from lightning.pytorch.callbacks import BasePredictionWriter


class LayerWriter(BasePredictionWriter):
    """What a walk's `visit` returns of a block is a `BlockResult`, or None where there is nothing to write."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def write_on_batch_end(self, trainer, walk, result, batch_indices, block, number: int, dataloader_idx: int) -> None:
        if trainer.is_global_zero and result is not None:
            walk.files.write(block, result)
