"""Measures held-out text while training, and stops once its perplexity no longer falls."""

from lightning.pytorch import Callback

from pipeline.recovery.held_out import HeldOut
from pipeline.runtime import processes


class Validation(Callback):
    """Every `every` steps, and after the last; `module.val_perplexity` tells whoever logs."""

    def __init__(self, held_out: HeldOut, every: int) -> None:
        self.held_out, self.every, self.seen = held_out, every, 0

    def on_train_start(self, trainer, module) -> None:
        self.held_out.check_best()  # before the rest is trained in vain
        if self.held_out.is_over():  # the checkpoint is of the last step
            trainer.should_stop = True

    def on_train_batch_end(self, trainer, module, outputs, batch, index: int) -> None:
        step, held_out = trainer.global_step, self.held_out
        if step == self.seen or (step % self.every and step != trainer.max_steps):
            return  # still accumulating, or not yet
        self.seen = step
        module.val_perplexity = held_out.measure(module.model, module.device, trainer.precision_plugin.forward_context)
        processes.say(f"  step {step}/{trainer.max_steps}: validation perplexity {module.val_perplexity:.3f}")
        held_out.take(module.val_perplexity, module.model)
        if held_out.is_over():
            processes.say(
                f"  no progress in {held_out.since} validations: training stops at its best, {held_out.lowest:.3f}"
            )
            trainer.should_stop = True

    def state_dict(self) -> dict:
        return {"lowest": self.held_out.lowest, "since": self.held_out.since, "seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.held_out.lowest, self.held_out.since, self.seen = state["lowest"], state["since"], state["seen"]
