"""Measures the perplexity of held-out text while a model trains, and keeps the weights that were best."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.data import token_windows
from pipeline.recovery import sharding
from pipeline.recovery.training import next_token_loss
from pipeline.runtime import checksums, files, processes
from pipeline.runtime.errors import UserError


class HeldOut:
    """With `patience`, a training is over after so many measurements without progress; `restore` then puts back the weights
    that were best, kept in the stage's `folder`."""

    def __init__(self, windows_NT: Tensor, batch_size: int, patience: int, folder: Path) -> None:
        self.windows_NT, self.batch_size, self.patience = windows_NT, batch_size, patience
        self.folder, self.best = folder, folder / "checkpoints/best.safetensors"
        self.step, self.perplexity = 0, math.nan  # the last measurement
        self.lowest, self.since = math.inf, 0  # the best measurement, and how many came after it

    def is_over(self) -> bool:
        return 0 < self.patience <= self.since

    def check_best(self) -> None:
        if self.patience and self.lowest < math.inf and not checksums.is_whole(self.folder, self.best):
            raise UserError(f"{self.best} is damaged or missing: remove {self.folder} and repeat the command")

    def take(self, step: int, perplexity: float, model: nn.Module) -> None:
        """Records a measurement, and keeps the model's trained weights if it is the best. All ranks must call."""
        self.step, self.perplexity = step, perplexity
        if not perplexity < self.lowest:  # NaN is no progress
            self.since += 1
            return
        self.lowest, self.since = perplexity, 0
        if self.patience:
            trained = sharding.gather_trained(model)
            if processes.is_main():
                with files.atomic_write(self.best) as tmp:
                    save_file(trained, tmp)
                checksums.record(self.folder, self.best)
            processes.barrier()

    @torch.no_grad()
    def measure(
        self, model: nn.Module, device: torch.device, context: Callable[[], AbstractContextManager] = nullcontext
    ) -> float:
        """exp of the mean loss of all tokens that bear one, the same on any number of processes; `context`: the precision's,
        in which Lightning calls no hook."""
        world_size, rank = processes.world_size(), processes.rank()
        batches = self.windows_NT.split(self.batch_size)
        total = torch.zeros(2, dtype=torch.float64, device=device)
        model.eval()
        for start in range(0, len(batches), world_size):
            mine = min(start + rank, len(batches) - 1)  # a sharded model needs every rank, a rank without a batch too
            ids_BT, labels_BT = token_windows.ids_and_labels(batches[mine].long().to(device))
            with context():
                logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
                loss = next_token_loss(logits_BTV, labels_BT, "sum")
            if mine == start + rank:
                total += torch.stack([loss.double(), (labels_BT[:, 1:] >= 0).sum().double()])
        model.train()
        loss, count = processes.all_sum(total).tolist()
        return math.exp(min(loss / max(count, 1.0), 700.0))

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """After a training; no hook of it, for one that is resumed after its last step calls none."""
        if not self.patience or self.lowest == math.inf:
            return
        self.check_best()
        best = load_file(self.best)
        for name, parameter in model.named_parameters():
            if name in best:
                sharding.local_shard(parameter).copy_(sharding.shard_like(best[name], parameter))
