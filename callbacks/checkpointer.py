"""Writes the checkpoints from which a training resumes."""

from pathlib import Path

from lightning.pytorch import Callback

from pipeline.runtime import processes


class Checkpointer(Callback):
    """Writes one every `every` optimizer steps and after the last one to `folder`, and removes older ones.

    Not Lightning's ModelCheckpoint: resumed in the middle of an accumulation, it saves the same step again without the
    accumulated gradients, and a second resume starts there.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every

    def on_train_start(self, trainer, module) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, index: int) -> None:
        if trainer.global_step == self.step:
            return  # still accumulating
        self.step = trainer.global_step
        if self.step % self.every == 0 or self.step == trainer.max_steps or trainer.should_stop:
            self.save(trainer)

    def save(self, trainer) -> None:
        path = self.folder / f"step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if processes.is_main():
            for older in set(self.folder.glob("*.ckpt")) - {path}:
                older.unlink()
