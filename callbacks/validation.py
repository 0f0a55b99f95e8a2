"""Measures the perplexity of held-out text during training, and stops the training when it no longer falls."""

from lightning.pytorch import Callback

from pipeline.recovery.held_out import HeldOut
from pipeline.runtime import processes


class Validation(Callback):
    """Measures every `every` steps and after the last one; `held_out` keeps the result, which the log reads."""

    def __init__(self, held_out: HeldOut, every: int) -> None:
        self.held_out, self.every = held_out, every

    def on_train_start(self, trainer, module) -> None:
        self.held_out.check_best()  # fails now rather than after the training
        if self.held_out.is_over():  # the checkpoint is of the last step
            trainer.should_stop = True

    def on_train_batch_end(self, trainer, module, outputs, batch, index: int) -> None:
        step, held_out = trainer.global_step, self.held_out
        if step == held_out.step or (step % self.every and step != trainer.max_steps):
            return  # still accumulating, or not due
        perplexity = held_out.measure(module.model, module.device, trainer.precision_plugin.forward_context)
        processes.say(f"  step {step}/{trainer.max_steps}: validation perplexity {perplexity:.3f}")
        held_out.take(step, perplexity, module.model)
        if held_out.is_over():
            processes.say(
                f"  no improvement in {held_out.since} validations: training stops at its best, {held_out.lowest:.3f}"
            )
            trainer.should_stop = True

    def state_dict(self) -> dict:
        held_out = self.held_out
        return {"lowest": held_out.lowest, "since": held_out.since, "seen": held_out.step, "best": held_out.best_step}

    def load_state_dict(self, state: dict) -> None:
        held_out = self.held_out
        held_out.lowest, held_out.since, held_out.step = (state[key] for key in ("lowest", "since", "seen"))
        held_out.best_step = state["best"]
