"""Writes a CSV row per optimizer step, and prints some of them."""

import csv
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from pipeline.recovery.held_out import HeldOut
from pipeline.runtime import files, memory, processes

COLUMNS = ("step", "loss", "lr", "tokens_per_second", "memory_gib", "val_perplexity")


class StepLog(Callback):
    """`loss` is the mean over all sequences of the step, on all ranks. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, held_out: HeldOut | None = None, lines: int = 10) -> None:
        self.path, self.held_out, self.lines = path, held_out, lines
        self.losses: list[Tensor] = []
        self.tokens = 0  # or images

    def on_train_start(self, trainer, module) -> None:
        self.started = time.perf_counter()
        self.step = trainer.global_step
        if trainer.is_global_zero:
            rows = list(csv.reader(self.path.open()))[1:] if self.path.exists() else []
            complete = (row for row in rows if len(row) == len(COLUMNS))  # a kill may have cut the last one
            with files.atomic_write(self.path) as tmp, tmp.open("w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *(row for row in complete if int(row[0]) <= self.step)])

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.lr = optimizer.param_groups[0]["lr"]  # after the step, the schedule has set that of the next one

    def on_train_batch_end(self, trainer, module, outputs, batch: Any, index: int) -> None:
        self.losses.append(outputs["loss"].detach())
        self.tokens += module.task.size(batch) * trainer.world_size
        if trainer.global_step == self.step:
            return  # still accumulating
        self.step = trainer.global_step
        # Lightning has divided each loss by the number of accumulated batches
        loss = processes.all_sum(torch.stack(self.losses).sum().double()).item() / trainer.world_size
        speed = self.tokens / (time.perf_counter() - self.started)
        row = {"step": self.step, "loss": round(loss, 6), "lr": self.lr, "tokens_per_second": round(speed)}
        row["memory_gib"] = round(memory.peak_gib(module.device), 3)
        if self.held_out and self.held_out.step == self.step:
            row["val_perplexity"] = round(self.held_out.perplexity, 4)
        if trainer.is_global_zero:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS, restval="").writerow(row)
            for logger in trainer.loggers:
                logger.log_metrics(row, self.step)
        every = max(1, trainer.max_steps // self.lines)
        if self.step % every == 0 or self.step == trainer.max_steps:
            processes.say(
                f"  step {self.step}/{trainer.max_steps}: loss {loss:.4f}, {speed:,.0f} {module.task.unit}/s, "
                f"memory {memory.text(row['memory_gib'])}"
            )
        self.losses, self.tokens, self.started = [], 0, time.perf_counter()
