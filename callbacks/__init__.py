"""Lightning callbacks: they wire the engine and the trainings to what is done at each layer and step."""

from pathlib import Path

from lightning.pytorch import Callback

from callbacks.checkpointer import Checkpointer
from callbacks.step_log import StepLog
from callbacks.stop_at_signal import StopAtSignal


def of_training(folder: Path, checkpoint_every: int | None) -> list[Callback]:
    """What every training of a stage needs, in the order in which it must run: a step is logged, then a signal that came
    meanwhile is answered, then a checkpoint is written. Leaves `metrics.csv` and `checkpoints/` in `folder`; with None no
    checkpoints, and signals are left alone."""
    if checkpoint_every is None:
        return [StepLog(folder / "metrics.csv")]
    saver = Checkpointer(folder / "checkpoints", checkpoint_every)
    return [StepLog(folder / "metrics.csv"), StopAtSignal(saver.save), saver]
