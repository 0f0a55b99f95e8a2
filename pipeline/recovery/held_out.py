"""Measures the perplexity of held-out data while a model trains, and keeps the weights that were best."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import tasks
from pipeline.recovery import sharding
from pipeline.recovery.checkpoints import step_of
from pipeline.runtime import checksums, files, processes
from pipeline.runtime.errors import UserError
from pipeline.tasks.task import Samples


class HeldOut:
    """`patience`: the number of measurements without improvement after which training stops; `restore` then loads the best
    weights, which are kept in the stage's `folder`, in a file for their step: the last checkpoint needs those before it. 0:
    never."""

    def __init__(self, samples: Samples, batch_size: int, patience: int, folder: Path) -> None:
        self.samples, self.batch_size, self.patience = samples, batch_size, patience
        self.folder = folder
        self.step, self.perplexity = 0, math.nan  # the last measurement
        self.lowest, self.since = math.inf, 0  # the best measurement, and how many came after it
        self.best_step = 0  # of the best measurement

    @property
    def best(self) -> Path:
        return self.folder / f"checkpoints/best={self.best_step}.safetensors"

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
        self.lowest, self.since, self.best_step = perplexity, 0, step
        if self.patience:
            trained = sharding.gather_trained(model)
            if processes.is_main():
                for path in self._unneeded():
                    path.unlink()
                with files.atomic_write(self.best) as tmp:
                    save_file(trained, tmp)
                checksums.record(self.folder, self.best)
            processes.barrier()

    def _unneeded(self) -> list[Path]:
        """The files of best weights that the last checkpoint does not need."""
        folder = self.best.parent
        saved = max(map(step_of, folder.glob("*.ckpt")), default=0)
        found = sorted(folder.glob("best=*.safetensors"), key=step_of)
        needed = [path for path in found if step_of(path) <= saved][-1:]
        return [path for path in found if path not in needed]

    @torch.no_grad()
    def measure(
        self, model: nn.Module, device: torch.device, context: Callable[[], AbstractContextManager] = nullcontext
    ) -> float:
        """exp of the mean loss of all predictions that have one, the same on any number of processes. `context`: the autocast
        of the training's precision, which Lightning does not enter for hooks."""
        task, world_size, rank = tasks.of(model.config), processes.world_size(), processes.rank()
        starts = range(0, len(self.samples), self.batch_size)
        total = torch.zeros(2, dtype=torch.float64, device=device)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        for first in range(0, len(starts), world_size):
            mine = min(first + rank, len(starts) - 1)  # a sharded model needs every rank, a rank without a batch too
            batch = self.samples[starts[mine] : starts[mine] + self.batch_size]
            inputs, labels = task.inputs_and_labels(move_data_to_device(batch, device))
            with context():
                loss = task.cross_entropy(task.logits(model, inputs), labels, "sum")
            if mine == first + rank:
                total += torch.stack([loss.double(), (task.targets(labels) >= 0).sum().double()])
        for module, training in modes:
            module.training = training
        loss, count = processes.all_sum(total).tolist()
        return math.exp(min(loss / max(count, 1.0), 700.0))

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Loads the best weights. Called after training and not by a hook: a run resumed after its last step calls no hook."""
        if not self.patience or self.lowest == math.inf:
            return
        self.check_best()
        best = load_file(self.best)
        for name, parameter in model.named_parameters():
            if name in best:
                sharding.local_shard(parameter).copy_(sharding.shard_like(best[name], parameter))
