"""Owns the answer to a stage that runs out of memory: one line, with the key to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.registry import FINETUNE_METHODS
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError, one_line
from pipeline.settings.schema import Recipe

# how libraries that raise a plain RuntimeError say it
SAID = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "_STATUS_NOT_INITIALIZED")


@contextmanager
def answered(stage: str, recipe: Recipe) -> Iterator[None]:
    """Turns running out of memory inside into a `UserError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(words in str(error) for words in SAID):
            raise
        where = "the GPU has" if processes.device().type == "cuda" else "this machine has"
        told = one_line(str(error).partition(". ")[0])[:120]
        raise UserError(
            f"the {stage} stage: {where} too little memory: set {advice(stage, recipe)} ({told})"
        ) from error


def advice(stage: str, recipe: Recipe) -> str:
    """The setting that frees most for the least, of those that are not set yet."""
    if stage == "finetune":
        return _finetune(recipe)
    if stage == "pretrain":
        return f"pretrain.batch_size={max(1, recipe.pretrain.batch_size // 2)}"
    if stage == "evaluate":
        if recipe.evaluate.batch_size != 1:
            return "evaluate.batch_size=1"
        if recipe.evaluate.placement != "stream":
            return "evaluate.placement=stream"
        return f"evaluate.seq_len={recipe.evaluate.seq_len // 2}"
    section = "reconstruct" if stage == "reconstruct" else "calibration"
    settings = getattr(recipe, section)
    if settings.batch_size > 1:
        return f"{section}.batch_size=1"
    if recipe.prune.hidden_states != "cpu" and processes.device().type == "cuda":
        return "prune.hidden_states=cpu"
    return f"{section}.seq_len={(settings.seq_len or recipe.calibration.seq_len) // 2}"


def _finetune(recipe: Recipe) -> str:
    settings, several = recipe.finetune, processes.world_size() > 1
    if settings.batch_size % 2 == 0:
        return f"finetune.batch_size={settings.batch_size // 2} finetune.accumulate={2 * settings.accumulate}"
    if not settings.checkpoint_activations:
        return "finetune.checkpoint_activations=true"
    if several and settings.strategy == "ddp" and not settings.quantize and settings.optimizer == "adamw":
        return "finetune.strategy=fsdp"
    frozen = not FINETUNE_METHODS.entry(settings.method).trains_weights
    if frozen and settings.strategy == "ddp" and not settings.quantize:
        return "finetune.quantize=nf4"
    return f"finetune.seq_len={settings.seq_len // 2}"
