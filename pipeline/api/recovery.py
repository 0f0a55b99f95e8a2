"""`finetune`: trains a pruned model in memory with its masks kept."""

import csv
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import tasks
from pipeline.data import images, token_windows
from pipeline.models import loading
from pipeline.recovery.methods import FinetuneMethod
from pipeline.recovery.training import sequences_per_step
from pipeline.recovery.training_dtype import weights_dtype
from pipeline.registry import FINETUNE_METHODS
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune, Recipe
from pipeline.sparsity.masks import Masks
from pipeline.stages import finetune as finetune_stage
from pipeline.tasks.task import Samples

from . import image_inputs, inputs, model_state
from .inputs import Texts
from .pruning import refuse_violations

COMMAND_ONLY = {  # keys of the recipe's section that are not arguments, and why
    "quantize": "a model in memory is trained with its own weights",
    "strategy": "there is one process",
    "loggers": "the steps are returned",
    "checkpoint_every": "no checkpoint is written",
    "dataset": "set texts=...",
    "config": "name a configuration as in texts='wikitext2:wikitext-2-v1'",
    "split": "name a split as in texts='c4@validation'",
}


@inputs.api_function
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
    """Trains a pruned `model` in place. At the end it holds the merged weights, exactly as sparse as `masks`.

    `method`: "lora" (a masked LoRA, merged at the end), "full" (every kept weight), or a .py file. `max_steps` optimizer steps
    of `batch_size` windows of `seq_len` tokens. `texts` are shuffled with `seed` and packed, as the command does; a tensor
    (N, T) of token ids is used in its order, repeatedly if it is too short. `tokenizer`: by default that of the folder or
    repository the model was loaded from. An image classifier is trained on images with labels, and `tokenizer` is its image
    processor. `validation`: held-out text, measured every `validate_every` steps. `teacher`: the dense model, for `distill`.
    `settings`: any other key of the recipe's section `finetune` (`espalier keys finetune`), such as `rank`, `targets`,
    `accumulate` or `precision`.

    If there is a GPU, it is used, wherever the model is. Returns a row per step: "step", "loss", "lr", "tokens_per_second",
    "memory_gib", and "val_perplexity" if it was measured. Raises `UserError`, also if a pruned weight of `model` is not zero.
    """
    inputs.check_model(model)
    inputs.check_masks(masks, model)
    for key in settings.keys() & COMMAND_ONLY.keys():
        raise UserError(f"{key} is not an argument of finetune: {COMMAND_ONLY[key]}")
    section = {"method": method, "max_steps": max_steps, "seq_len": seq_len, "batch_size": batch_size, "lr": lr}
    # any name, so that the checks know of a validation set
    section |= {"column": column, "validation": None if validation is None else "validation", **settings}
    recipe = inputs.recipe(["prune", "finetune"], seed, mirror, finetune=section)
    finetune = recipe.finetune
    _check_settings(model, recipe)
    _check_teacher(model, teacher, finetune)
    refuse_violations(model, masks)
    count = finetune.max_steps * sequences_per_step(finetune)
    found = _samples(texts, "texts", count, finetune, tokenizer, model, seed, mirror, "train")
    held_out = None
    if validation is not None:
        count = finetune.validation_samples
        plain = dataclasses.replace(finetune, augment=False)
        held_out = _samples(validation, "validation", count, plain, tokenizer, model, 0, mirror, "validation")

    models = [model] if teacher is None else [model, teacher]
    marked = model_state.pointwise(inputs.has_convolutions(masks), model)
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder, model_state.preserved(*models), marked:
        originals = {name: (p, p.data) for name, p in model.named_parameters(remove_duplicate=False)}
        trained = _training_copy(model, finetune)
        recovery = finetune_stage.train(
            trained, masks, found, held_out, finetune, seed, Path(folder), teacher, checkpoints=False
        )
        _merge_(originals, recovery)
        rows = _rows(Path(folder, "metrics.csv"))
    assert not masks.violations(model.named_parameters(remove_duplicate=False))
    return rows


def _training_copy(model: PreTrainedModel, settings: Finetune) -> nn.Module:
    """A copy in its training dtype. The parameters are those of `model`, with other data until `preserved` restores it."""
    trained, stored = model_state.copy_sharing_weights(model), model.dtype
    dtype = weights_dtype(settings, str(stored).removeprefix("torch."))
    if dtype == "float32":
        return trained.float()
    if dtype is not None:
        for parameter in trained.parameters():
            if parameter.dtype == stored:
                parameter.data = parameter.data.to(getattr(torch, dtype))
    return trained


@torch.no_grad()
def _merge_(originals: dict[str, tuple[nn.Parameter, Tensor]], recovery: FinetuneMethod) -> None:
    """Writes the trained weights into the original tensors. A parameter with several names is written once."""
    merged: set[int] = set()
    for name, (parameter, original) in originals.items():
        if id(parameter) in merged:
            continue
        if (weight := recovery.merged(name, original)) is not None:
            original.copy_(weight)
            merged.add(id(parameter))


def _check_settings(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raises `UserError` for settings that do not fit the model, or leave no merged model."""
    settings = recipe.finetune
    tasks.of(model.config).check(recipe, type(model).__name__)
    if not FINETUNE_METHODS.entry(settings.method).leaves_model:
        merging = " or ".join(name for name, entry in FINETUNE_METHODS.entries.items() if entry.leaves_model)
        raise UserError(f"method={settings.method} is not merged into the weights: set method={merging}")
    finetune_stage.check_bias(settings, str(model.dtype))


def _check_teacher(model: PreTrainedModel, teacher: PreTrainedModel | None, settings: Finetune) -> None:
    if teacher is None:
        if settings.distill:
            raise UserError(f"distill={settings.distill:g} needs the dense model: pass teacher=...")
        return
    inputs.check_model(teacher, "teacher", may_be_compact=True)
    if not settings.distill:
        raise UserError("teacher is unused because distill is 0: set distill=0.5")
    if teacher is model:
        raise UserError("teacher is the pruned model itself: load the dense model again")
    kind = "num_labels" if image_inputs.are_read_by(model) else "vocab_size"
    sizes = [getattr(one.config.get_text_config(), kind, None) for one in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(f"teacher has {kind}={sizes[1]}, and model {sizes[0]}: pass the dense model that was pruned")


def _samples(
    data: Texts,
    name: str,
    count: int,
    settings: Finetune,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    seed: int,
    mirror: str | None,
    split: str,
) -> Samples:
    """(count, T) windows; tokens without loss are stored as their complement, see `pipeline.data.token_windows`. Or `count`
    images with labels."""
    if image_inputs.are_read_by(model):
        if isinstance(data, Tensor):
            raise UserError(
                f"{name} is a tensor, which has no labels: pass a datasets.Dataset, a data set's name, or a folder"
            )
        source = image_inputs.source(data, "finetune", name, settings.column, mirror, split)
        processor = image_inputs.processor_of(model, tokenizer)
        return images.repeated(source, processor, model.config, count, seed, settings.augment)
    if isinstance(data, Tensor):
        windows_NT = inputs.token_windows(data, name, model, has_loss=True)
        return windows_NT[torch.arange(count) % len(windows_NT)]
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
