"""Stops a walk after the current layer, or a training after the current step, if a signal has been received."""

from collections.abc import Callable

from lightning.pytorch import Callback, Trainer

from pipeline.runtime import processes, signals
from pipeline.runtime.errors import Stopped


class StopAtSignal(Callback):
    """Comes after the callbacks that write layers and logs, so that these are on disk; `save(trainer)` writes a checkpoint.

    A signal reaches the processes at different times, or only one of them, so they agree after each layer and step.
    """

    def __init__(self, save: Callable[[Trainer], None] | None = None) -> None:
        self.save = save

    def on_predict_start(self, trainer, module) -> None:
        signals.defer_signals()

    def on_predict_batch_end(self, trainer, module, outputs, batch, index: int, dataloader_idx: int = 0) -> None:
        if processes.any_rank(bool(signals.received())):
            if module.results is not None:
                module.results.flush()  # on all ranks: launchers end the others when one process ends
            raise Stopped(f"stopped by {_signal()} after layer {index + 1}")

    def on_train_start(self, trainer, module) -> None:
        self.step = trainer.global_step
        signals.defer_signals()

    def on_train_batch_end(self, trainer, module, outputs, batch, index: int) -> None:
        if trainer.global_step == self.step:
            return  # still accumulating
        self.step = trainer.global_step
        if processes.any_rank(bool(signals.received())):
            self.save(trainer)
            raise Stopped(f"stopped by {_signal()} after step {self.step}, with a checkpoint")

    def on_predict_end(self, trainer, module) -> None:
        self._resume()

    def on_train_end(self, trainer, module) -> None:
        self._resume()

    def on_exception(self, trainer, module, exception: BaseException) -> None:
        signals.resume_signals()

    def _resume(self) -> None:
        signals.resume_signals()
        if signals.received():  # after the last step
            raise Stopped(f"stopped by {_signal()}")


def _signal() -> str:
    return signals.received() or "a signal to another process"
