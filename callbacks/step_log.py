"""Writes one CSV row per optimizer step, and now and then a line for the terminal."""

import csv
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import Tensor

from pipeline.runtime import files, memory, processes

COLUMNS = ("step", "loss", "lr", "tokens_per_second", "memory_gib", "val_perplexity")


class StepLog(Callback):
    """`loss` is the mean over all sequences of the step, on all ranks. A resumed run drops the rows past its checkpoint."""

    def __init__(self, path: Path, lines: int = 10) -> None:
        self.path, self.lines = path, lines
        self.losses: list[Tensor] = []
        self.tokens = 0

    def on_train_start(self, trainer, module) -> None:
        self.started = time.perf_counter()
        self.step = trainer.global_step
        if trainer.is_global_zero:
            rows = list(csv.reader(self.path.open()))[1:] if self.path.exists() else []
            whole = (row for row in rows if len(row) == len(COLUMNS))  # a kill may cut the last
            with files.atomic_write(self.path) as tmp, tmp.open("w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *(row for row in whole if int(row[0]) <= self.step)])

    def on_train_batch_end(self, trainer, module, outputs, batch: Tensor, index: int) -> None:
        self.losses.append(outputs["loss"].detach())
        self.tokens += batch.numel() * trainer.world_size
        if trainer.global_step == self.step:
            return  # still accumulating
        self.step = trainer.global_step
        # Lightning hands over each loss divided by the number of accumulated batches
        loss = processes.all_sum(torch.stack(self.losses).sum().double()).item() / trainer.world_size
        speed = self.tokens / (time.perf_counter() - self.started)
        row = {
            "step": self.step,
            "loss": round(loss, 6),
            "lr": trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0],
            "tokens_per_second": round(speed),
            "memory_gib": round(memory.peak_gib(module.device), 3),
        }
        validated = module.val_perplexity
        if validated is not None:
            row["val_perplexity"], module.val_perplexity = round(validated, 4), None
        if trainer.is_global_zero:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS, restval="").writerow(row)
            for logger in trainer.loggers:
                logger.log_metrics(row, self.step)
        every = max(1, trainer.max_steps // self.lines)
        if self.step % every == 0 or self.step == trainer.max_steps:
            processes.say(
                f"  step {self.step}/{trainer.max_steps}: loss {loss:.4f}, {speed:,.0f} tokens/s, "
                f"memory {memory.text(row['memory_gib'])}"
            )
        self.losses, self.tokens, self.started = [], 0, time.perf_counter()
