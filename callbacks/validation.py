"""Measures the perplexity of held-out text while training, and stops once it no longer falls."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.data import token_windows
from pipeline.recovery import sharding
from pipeline.recovery.training import next_token_loss
from pipeline.runtime import checksums, files, processes
from pipeline.runtime.errors import UserError


class Validation(Callback):
    """Every `every` steps; `module.val_perplexity` tells whoever logs. With `patience`, training stops after so many
    measurements without progress; `restore` then puts back the weights that were best, kept in the stage's `folder`."""

    def __init__(self, windows_NT: Tensor, batch_size: int, every: int, patience: int, folder: Path) -> None:
        self.windows_NT, self.batch_size, self.every, self.patience = windows_NT, batch_size, every, patience
        self.folder, self.best = folder, folder / "checkpoints/best.safetensors"
        self.lowest, self.since, self.seen = math.inf, 0, 0

    def on_train_start(self, trainer, module) -> None:
        if self.patience and self.lowest < math.inf:
            self._check_best()  # before the rest is trained in vain
        if self._is_over():  # the checkpoint is of the last step
            trainer.should_stop = True

    def _check_best(self) -> None:
        if not checksums.is_whole(self.folder, self.best):
            raise UserError(f"{self.best} is damaged or missing: remove {self.folder} and repeat the command")

    def _is_over(self) -> bool:
        return 0 < self.patience <= self.since

    def on_train_batch_end(self, trainer, module, outputs, batch, index: int) -> None:
        step = trainer.global_step
        if step == self.seen or (step % self.every and step != trainer.max_steps):
            return  # still accumulating, or not yet
        self.seen = step
        module.val_perplexity = self.measure(module, trainer.precision_plugin.forward_context)
        processes.say(f"  step {step}/{trainer.max_steps}: validation perplexity {module.val_perplexity:.3f}")
        if module.val_perplexity < self.lowest:
            self.lowest, self.since = module.val_perplexity, 0
            if self.patience:
                self._keep(module.model)
        else:
            self.since += 1
            if self._is_over():
                processes.say(
                    f"  no progress in {self.since} validations: training stops at its best, {self.lowest:.3f}"
                )
                trainer.should_stop = True

    @torch.no_grad()
    def measure(self, module, context: Callable[[], AbstractContextManager] = nullcontext) -> float:
        """exp of the mean loss of all tokens that bear one, the same on any number of processes; `context`: the precision's,
        in which Lightning calls no hook."""
        world_size, rank = processes.world_size(), processes.rank()
        batches = self.windows_NT.split(self.batch_size)
        total = torch.zeros(2, dtype=torch.float64, device=module.device)
        module.model.eval()
        for start in range(0, len(batches), world_size):
            mine = min(start + rank, len(batches) - 1)  # a sharded model needs every rank, a rank without a batch too
            ids_BT, labels_BT = token_windows.ids_and_labels(batches[mine].long().to(module.device))
            with context():
                logits_BTV = module.model(input_ids=ids_BT, use_cache=False).logits
                loss = next_token_loss(logits_BTV, labels_BT, "sum")
            if mine == start + rank:
                total += torch.stack([loss.double(), (labels_BT[:, 1:] >= 0).sum().double()])
        module.model.train()
        loss, count = processes.all_sum(total).tolist()
        return math.exp(min(loss / max(count, 1.0), 700.0))

    def _keep(self, model) -> None:
        trained = sharding.gather_trained(model)
        if processes.is_main():
            with files.atomic_write(self.best) as tmp:
                save_file(trained, tmp)
            checksums.record(self.folder, self.best)
        processes.barrier()

    @torch.no_grad()
    def restore(self, model) -> None:
        """After a training; no hook of it, for one that is resumed after its last step calls none."""
        if not self.patience or self.lowest == math.inf:
            return
        self._check_best()
        best = load_file(self.best)
        for name, parameter in model.named_parameters():
            if name in best:
                sharding.local_shard(parameter).copy_(sharding.shard_like(best[name], parameter))

    def state_dict(self) -> dict:
        return {"lowest": self.lowest, "since": self.since, "seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.lowest, self.since, self.seen = state["lowest"], state["since"], state["seen"]
