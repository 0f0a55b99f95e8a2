"""Writes each finished block, so that a killed run resumes after it."""

from contextlib import suppress

from lightning.pytorch.callbacks import BasePredictionWriter

from pipeline.runtime.errors import UserError


class LayerWriter(BasePredictionWriter):
    """Writes the `BlockResult` that a walk's `visit` returns for a block, if any. All is on disk when the walk has ended, also
    by an exception."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def write_on_batch_end(self, trainer, walk, result, batch_indices, block, number: int, dataloader_idx: int) -> None:
        if result is not None:
            walk.results.write(block, result)

    def on_predict_end(self, trainer, walk) -> None:
        walk.results.flush()

    def on_exception(self, trainer, walk, exception: BaseException) -> None:
        with suppress(UserError):  # the first error is reported
            walk.results.wait()
