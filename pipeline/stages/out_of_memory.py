"""Reports a stage that runs out of memory in one line, with the key to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.registry import FINETUNE_METHODS
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError, one_line
from pipeline.settings.schema import Recipe

# in the messages of libraries that raise a plain RuntimeError
MESSAGES = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "_STATUS_NOT_INITIALIZED")


@contextmanager
def as_user_error(stage: str, recipe: Recipe) -> Iterator[None]:
    """Turns an out-of-memory error inside the block into a `UserError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        is_memory_error = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_memory_error and not any(message in str(error) for message in MESSAGES):
            raise
        machine = "the GPU" if processes.device().type == "cuda" else "this machine"
        reason = one_line(str(error).partition(". ")[0])[:120]
        settings = advice(stage, recipe)
        what_to_do = f"set {settings}" if settings else "repeat the command where there is more"
        raise UserError(f"the {stage} stage: {machine} has too little memory: {what_to_do} ({reason})") from error


def advice(stage: str, recipe: Recipe) -> str | None:
    """The settings to change next: the cheapest that saves much memory and is not set yet. None if there is none."""
    if stage in ("export", "report"):
        return None
    if stage == "speed":
        return "speed.batches=[1] speed.prompt_lengths=[]" if recipe.speed.batches != [1] else None
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
    settings = recipe.finetune
    if settings.batch_size % 2 == 0:
        return f"finetune.batch_size={settings.batch_size // 2} finetune.accumulate={2 * settings.accumulate}"
    if not settings.checkpoint_activations:
        return "finetune.checkpoint_activations=true"
    if settings.strategy == "ddp" and not settings.quantize:
        if processes.world_size() > 1 and settings.optimizer == "adamw":
            return "finetune.strategy=fsdp"
        if not FINETUNE_METHODS.entry(settings.method).trains_weights:
            return "finetune.quantize=nf4"
    return f"finetune.seq_len={settings.seq_len // 2}"
