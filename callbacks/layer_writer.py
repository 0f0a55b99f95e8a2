"""Writes each finished block, so that a killed run resumes after it."""

from lightning.pytorch.callbacks import BasePredictionWriter


class LayerWriter(BasePredictionWriter):
    """Writes the `BlockResult` that a walk's `visit` returns for a block, if any."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def write_on_batch_end(self, trainer, walk, result, batch_indices, block, number: int, dataloader_idx: int) -> None:
        if trainer.is_global_zero and result is not None:
            walk.files.write(block, result)
