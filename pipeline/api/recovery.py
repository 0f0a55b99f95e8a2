"""`finetune`: a pruned model in memory is trained back to health, with its masks kept."""

import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data import token_windows
from pipeline.models import loading
from pipeline.recovery.training import sequences_per_step
from pipeline.recovery.training_dtype import frozen_dtype, trains_in_float32
from pipeline.registry import FINETUNE_METHODS
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune
from pipeline.sparsity.masks import Masks
from pipeline.stages import finetune as finetune_stage

from . import inputs, model_state
from .inputs import Texts
from .pruning import refuse_violations

NOT_HERE = {  # keys of the recipe's section that are the command's alone
    "quantize": "a model in memory is trained in its own weights",
    "strategy": "one process has nothing to share out",
    "loggers": "the steps are returned",
    "checkpoint_every": "no checkpoint is written",
    "dataset": "the text is the argument texts",
    "config": "name a configuration as in texts='wikitext2:wikitext-2-v1'",
    "split": "name a split as in texts='c4@validation'",
}


@inputs.in_arguments
def finetune(
    model: PreTrainedModel,
    masks: Masks,
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: str = "lora",
    *,
    max_steps: int = 1000,
    seq_len: int = 1024,
    batch_size: int = 8,
    lr: float = 1e-4,
    column: str | None = None,
    validation: Texts | None = None,
    teacher: PreTrainedModel | None = None,
    seed: int = 0,
    mirror: str | None = None,
    **settings: Any,
) -> list[dict[str, float]]:
    """Trains a pruned `model`, in place: at the end it holds the merged weights, exactly as sparse as `masks`.

    `method` is "lora" (a masked LoRA, merged at the end) or "full" (every kept weight). `max_steps` optimizer steps of
    `batch_size` windows of `seq_len` tokens; `texts` are shuffled by `seed` and packed end to end, as the command does; a
    tensor (N, T) of token ids is taken in its order, again from the start when it is used up. Without `tokenizer`, that
    beside the model is taken, where the model was loaded from. `validation` is held-out text, measured every
    `validate_every` steps. With `distill`, the dense `teacher` is distilled from. `settings`: any other key of the recipe's
    section `finetune` (`espalier keys finetune`), such as `rank`, `targets`, `accumulate` or `precision`.

    Trains on the GPU where there is one, wherever the model is. Returns a row for each step ("step", "loss", "lr",
    "tokens_per_second", "memory_gib", and "val_perplexity" where it was measured). Raises `UserError`, also where the pruned
    weights of `model` are not zero.
    """
    inputs.check_model(model)
    inputs.check_masks(masks, model)
    for key in settings.keys() & NOT_HERE.keys():
        raise UserError(f"{key} is not for finetune in memory: {NOT_HERE[key]}")
    chosen = {
        "method": method,
        "max_steps": max_steps,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "lr": lr,
        **settings,
    }
    # a name, so that what needs a validation set is not refused
    chosen |= {"column": column, "validation": None if validation is None else "given"}
    recipe = inputs.recipe(["prune", "finetune"], seed, mirror, finetune=chosen)
    wanted = recipe.finetune
    if not FINETUNE_METHODS.entry(wanted.method).leaves_model:
        merging = ", ".join(name for name, entry in FINETUNE_METHODS.entries.items() if entry.leaves_model)
        raise UserError(
            f"method={wanted.method} stays apart from the weights, which the command can do: set one of {merging}"
        )
    finetune_stage.check_bias(wanted, str(model.dtype))
    _check_teacher(model, teacher, wanted)
    refuse_violations(model, masks)
    count = wanted.max_steps * sequences_per_step(wanted)
    windows_NT = _windows(texts, "texts", count, wanted, tokenizer, model, seed, mirror, "train")
    held_out_NT = None
    if validation is not None:
        count = wanted.validation_samples
        held_out_NT = _windows(validation, "validation", count, wanted, tokenizer, model, 0, mirror, "validation")

    models = [model] if teacher is None else [model, teacher]
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder, model_state.kept(*models):
        homes = {name: (p, p.data) for name, p in model.named_parameters(remove_duplicate=False)}
        trained = model_state.with_same_weights(model)
        if trains_in_float32(wanted):
            trained.float()
        elif dtype := frozen_dtype(wanted, str(stored := model.dtype).removeprefix("torch.")):
            for parameter in trained.parameters():
                if parameter.dtype == stored:
                    parameter.data = parameter.data.to(getattr(torch, dtype))
        recovery = finetune_stage.train(
            trained, masks, windows_NT, held_out_NT, wanted, seed, Path(folder), teacher, checkpoints=False
        )
        with torch.no_grad():
            done: set[int] = set()
            for name, (parameter, home) in homes.items():
                if id(parameter) in done:
                    continue
                if (weight := recovery.merged(name, home)) is not None:
                    home.copy_(weight)
                    done.add(id(parameter))
        rows = _rows(Path(folder, "metrics.csv"))
    assert not masks.violations(model.named_parameters(remove_duplicate=False))
    return rows


def _check_teacher(model: PreTrainedModel, teacher: PreTrainedModel | None, settings: Finetune) -> None:
    if teacher is None:
        if settings.distill:
            raise UserError(f"distill={settings.distill:g} needs the dense model: pass teacher=...")
        return
    inputs.check_model(teacher, "teacher")
    if not settings.distill:
        raise UserError("teacher is given and distill is 0, so nothing is learnt from it: set distill=0.5")
    if teacher is model:
        raise UserError("teacher is the pruned model itself: load the dense model once more")


def _windows(
    data: Texts,
    name: str,
    count: int,
    settings: Finetune,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    seed: int,
    mirror: str | None,
    split: str,
) -> Tensor:
    """(count, T) windows; a token without loss is stored as its complement, see `pipeline.data.token_windows`."""
    if isinstance(data, Tensor):
        found = inputs.token_windows(data, name, model)
        return found[torch.arange(count) % len(found)]
    loading.check_length(model.config, "seq_len", settings.seq_len)
    tokenizer = inputs.tokenizer_of(model) if tokenizer is None else tokenizer
    inputs.check_tokenizer(tokenizer, model)
    source = inputs.source(data, "finetune", name, settings.column, mirror, split)
    windows_NT = token_windows.packed(source, tokenizer, settings.seq_len, count, seed, loss=settings.loss)
    inputs.check_ids(token_windows.ids_and_labels(windows_NT)[0], source, model)
    return windows_NT


def _rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
