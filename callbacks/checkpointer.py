"""Writes the checkpoints from which a training resumes."""

import time
from pathlib import Path

from lightning.pytorch import Callback

from pipeline.runtime import processes

SLOW = 5.0  # seconds; a save that takes longer is slow: full fine-tuning of 7B weights writes 81 GB
PAUSE = 20  # the next save comes at least this many times a slow save's duration later


class Checkpointer(Callback):
    """Writes a checkpoint to `folder` every `every` optimizer steps and after the last one, and removes older ones. Slow saves
    are repeated less often, so that they take at most a twentieth of the time.

    Not Lightning's ModelCheckpoint: resumed in the middle of an accumulation, it saves the same step again without the
    accumulated gradients, and a second resume starts there.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.seconds = self.saved = 0.0  # what the last save took, and when it ended

    def on_train_start(self, trainer, module) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, index: int) -> None:
        if trainer.global_step == self.step:
            return  # still accumulating
        self.step = trainer.global_step
        last = self.step == trainer.max_steps or trainer.should_stop
        if last or (self.step % self.every == 0 and not self._is_too_soon()):
            self.save(trainer)

    def _is_too_soon(self) -> bool:
        soon = self.seconds > SLOW and time.monotonic() - self.saved < PAUSE * self.seconds
        return processes.from_main(soon)

    def save(self, trainer) -> None:
        started, path = time.monotonic(), self.folder / f"step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if processes.is_main():
            for older in set(self.folder.glob("*.ckpt")) - {path}:
                older.unlink()
        self.saved = time.monotonic()
        self.seconds = self.saved - started
