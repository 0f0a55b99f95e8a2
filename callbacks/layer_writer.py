"""Writes each finished block, so that a killed run goes on where it stopped."""

from lightning.pytorch.callbacks import BasePredictionWriter


class LayerWriter(BasePredictionWriter):
    """Stands after the callback that prunes or reconstructs."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def write_on_batch_end(
        self, trainer, walk, prediction, batch_indices, block, number: int, dataloader_idx: int
    ) -> None:
        if trainer.is_global_zero and not walk.is_finished(block):
            walk.files.write(block, walk.masks, walk.log_row)
