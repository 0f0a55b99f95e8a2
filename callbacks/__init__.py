"""Lightning callbacks."""

from pathlib import Path

from lightning.pytorch import Callback

from callbacks.checkpointer import Checkpointer
from callbacks.step_log import StepLog
from callbacks.stop_at_signal import StopAtSignal
from callbacks.validation import Validation


def of_training(folder: Path, checkpoint_every: int | None, validation: Validation | None = None) -> list[Callback]:
    """The callbacks of every training, in the order in which they must run: a step is validated and logged, then a pending
    signal stops the training, then a checkpoint is written. They write `metrics.csv` and `checkpoints/` to `folder`.
    `checkpoint_every=None`: no checkpoints, and signals are not handled."""
    logging: list[Callback] = [StepLog(folder / "metrics.csv", validation and validation.held_out)]
    if validation:
        logging.insert(0, validation)
    if checkpoint_every is None:
        return logging
    saver = Checkpointer(folder / "checkpoints", checkpoint_every)
    return [*logging, StopAtSignal(saver.save), saver]
