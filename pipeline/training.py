"""Trains a causal LM on packed windows, resumable to the bit: what pretrain and finetune share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import get_cosine_schedule_with_warmup

from callbacks.step_log import StepLog
from callbacks.stop_at_signal import StopAtSignal
from pipeline import processes
from pipeline.checkpoints import WholeCheckpoints, newest
from pipeline.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """`batch_size * accumulate` sequences make a step, on however many processes."""

    max_steps: int
    batch_size: int
    accumulate: int
    lr: float
    warmup: float  # share of max_steps
    weight_decay: float
    clip: float  # gradient norm; 0 is off
    precision: str = "auto"
    checkpoint_every: int = 50
    seed: int = 0

    @property
    def sequences(self) -> int:
        return self.batch_size * self.accumulate

    def share(self, world_size: int) -> tuple[int, int]:
        """(batch_size, accumulate) of each of `world_size` processes."""
        each, rest = divmod(self.sequences, world_size)
        size = min(self.batch_size, each)
        if rest or each % size:
            raise UserError(
                f"{self.sequences} sequences a step (batch_size {self.batch_size} x accumulate {self.accumulate}) cannot be "
                f"shared evenly by {world_size} processes: type accumulate={world_size}, or another number of processes"
            )
        return size, each // size


class CausalLM(LightningModule):
    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.model, self.schedule = model, schedule
        self.strict_loading = False  # checkpoints hold only what trains

    def training_step(self, ids_BT: Tensor, index: int) -> Tensor:
        # dropout of a resumed run must be that of an uninterrupted one: its seed is the batch's, not history's
        torch.manual_seed((self.schedule.seed * 1_000_003 + index) * processes.world_size() + processes.rank())
        loss = self.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        schedule = self.schedule
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, schedule.lr, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)
        warmup = round(schedule.warmup * schedule.max_steps)
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, schedule.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


def fit(
    model: nn.Module, windows_NT: Tensor, schedule: Schedule, folder: Path, callbacks: Sequence[Callback] = ()
) -> None:
    """Trains `model` in place on (steps * sequences, T) windows, in their order; goes on from a checkpoint in `folder`.

    Leaves `folder/metrics.csv`. The checkpoints are the caller's to remove once its stage is whole.
    """
    rank, world_size = processes.rank(), processes.world_size()
    batch_size, accumulate = schedule.share(world_size)
    by_step = windows_NT.view(schedule.max_steps, schedule.sequences, -1)
    mine = by_step[:, rank::world_size].flatten(0, 1).long()
    checkpoints = folder / "checkpoints"
    trainer = Trainer(
        max_steps=schedule.max_steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=schedule.clip or None,
        precision=_precision(schedule.precision),
        callbacks=[
            *callbacks,
            StepLog(folder / "metrics.csv"),
            StopAtSignal(checkpoints),
            ModelCheckpoint(
                checkpoints, filename="{step}", every_n_train_steps=schedule.checkpoint_every, save_top_k=1
            ),
        ],
        plugins=[WholeCheckpoints(folder)],
        logger=False,
        enable_progress_bar=processes.on_terminal(),
        **processes.trainer_arguments(),
    )
    assert trainer.world_size == world_size
    model.train()
    # a plain DataLoader resumed mid-epoch repeats early batches and drops later ones
    loader = StatefulDataLoader(mine, batch_size=batch_size)
    last = newest(folder)
    if last:
        processes.say(f"  going on from {last.name}")
    trainer.fit(CausalLM(model, schedule), loader, ckpt_path=last, weights_only=True)
    model.eval()


def _precision(setting: str) -> str:
    if setting != "auto":
        return setting
    return "bf16-mixed" if torch.cuda.is_available() else "32-true"
