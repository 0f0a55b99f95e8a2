"""Trains a model on samples of its task, for pretrain and finetune. A resumed training gives the same bits."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning import Callback, Trainer
from torch import nn
from torch.utils.data import Subset
from torchdata.stateful_dataloader import StatefulDataLoader

from pipeline import tasks
from pipeline.recovery import sharding
from pipeline.recovery.checkpoints import AtomicCheckpoints, newest_checkpoint
from pipeline.recovery.trained_model import TrainedModel
from pipeline.recovery.training_dtype import precision
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune
from pipeline.tasks.task import Samples


def sequences_per_step(settings: Finetune) -> int:
    """Sequences per optimizer step, over all processes."""
    return settings.batch_size * settings.accumulate


def batch_per_process(settings: Finetune, world_size: int) -> tuple[int, int]:
    """(batch_size, accumulate) per process. Raises `UserError` if the sequences do not divide evenly."""
    each, rest = divmod(sequences_per_step(settings), world_size)
    size = min(settings.batch_size, each)
    if rest or each % size:
        raise UserError(
            f"batch_size {settings.batch_size} x accumulate {settings.accumulate} = {sequences_per_step(settings)} sequences "
            f"do not divide among {world_size} processes: set accumulate={world_size}, or another number of processes"
        )
    return size, each // size


def check_checkpointing(model: nn.Module) -> None:
    """Raises `UserError` if the model's code cannot recompute activations. The model needs no weights."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} cannot recompute activations: set finetune.checkpoint_activations=false, "
            "and a smaller finetune.batch_size to save memory"
        )


def training_mode(model: nn.Module) -> None:
    """Puts a model into training mode, except for its batch norms. They keep the dense model's statistics: those of small
    batches are noise, differ between processes, and are not in checkpoints."""
    model.train()
    for module in model.modules():
        if getattr(module, "track_running_stats", False):
            module.eval()


def fit(
    model: nn.Module,
    samples: Samples,
    settings: Finetune,
    seed: int,
    folder: Path,
    callbacks: Sequence[Callback] = (),
    teacher: nn.Module | None = None,
) -> None:
    """Trains `model` in place on `samples` (as many as all steps take), in order. If `folder` has a checkpoint, resumes there.

    The callbacks write checkpoints and logs (see `callbacks.of_training`). The caller removes the checkpoints when its stage
    is complete. Raises `UserError` if the loss is not finite or the checkpoint does not fit.
    """
    rank, world_size = processes.rank(), processes.world_size()
    batch_size, accumulate = batch_per_process(settings, world_size)
    order = torch.arange(len(samples)).view(settings.max_steps, sequences_per_step(settings))
    mine = Subset(samples, order[:, rank::world_size].flatten().tolist())
    counts = None
    if by_step := tasks.of(model.config).loss_counts(samples, settings.max_steps):
        counts = [count / (accumulate * world_size) for count in by_step for _ in range(accumulate)]
    trainer = Trainer(
        max_steps=settings.max_steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=settings.clip or None,
        precision=precision(settings.precision),
        callbacks=list(callbacks),
        enable_checkpointing=False,  # ours replaces Lightning's callback
        logger=_loggers(settings.loggers, folder),
        enable_progress_bar=processes.on_terminal(),
        **processes.trainer_arguments(
            sharding.ShardedStrategy if settings.strategy == "fsdp" else None, [AtomicCheckpoints(folder)]
        ),
    )
    assert trainer.world_size == world_size
    if settings.checkpoint_activations:
        check_checkpointing(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    training_mode(model)
    # a plain DataLoader resumed mid-epoch repeats early batches and drops later ones
    loader = StatefulDataLoader(mine, batch_size=batch_size)
    last = newest_checkpoint(folder)
    if last:
        processes.say(f"  resuming from {last.name}")
    trainer.fit(TrainedModel(model, settings, seed, teacher, counts), loader, ckpt_path=last, weights_only=True)
    if "wandb" in settings.loggers:
        import wandb

        wandb.finish()  # or wandb would keep writing into a finished stage
    model.eval()


def _loggers(names: list[str], folder: Path) -> list:
    """Lightning's loggers, in addition to metrics.csv. Raises `UserError` if a package is missing."""
    from lightning.pytorch import loggers

    try:
        made = []
        for name in names:
            if name == "tensorboard":
                made.append(loggers.TensorBoardLogger(folder, name="tensorboard", version=""))
            else:
                made.append(loggers.WandbLogger(project="espalier", save_dir=folder))
        return made
    except ModuleNotFoundError as error:
        raise UserError(f"finetune.loggers=[{name}] needs a package: run `pip install {name}`") from error
