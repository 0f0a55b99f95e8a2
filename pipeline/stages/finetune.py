"""The finetune stage: trains a pruned model and keeps its masks."""

import dataclasses
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from callbacks import of_training
from callbacks.mask_keeper import MaskKeeper
from callbacks.validation import Validation
from pipeline import tasks
from pipeline.data import sources
from pipeline.engine.blocks import find_blocks
from pipeline.models import loading
from pipeline.models.architecture import classifies_images
from pipeline.models.rewrite import rewrite
from pipeline.models.verification import check_matrices
from pipeline.pruning.allocation import allocate
from pipeline.recovery import lora, quantization
from pipeline.recovery.held_out import HeldOut
from pipeline.recovery.methods import FinetuneMethod
from pipeline.recovery.training import batch_per_process, check_checkpointing, fit, sequences_per_step
from pipeline.recovery.training_dtype import frozen_dtype, in_float32, precision, trains_in_float32, weights_dtype
from pipeline.registry import FINETUNE_METHODS
from pipeline.reporting import card
from pipeline.runtime import deterministic, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune, Recipe
from pipeline.sparsity.masks import Masks
from pipeline.tasks.task import Samples


def check(recipe: Recipe) -> None:
    """Raises `UserError` for settings that do not fit the model: length, targets, dtype, checkpointing."""
    if "finetune" not in recipe.stages or recipe.model is None:
        return
    folder = loading.locate(recipe.model, recipe.revision)
    config, settings = loading.config(folder, recipe), recipe.finetune
    loading.check_length(config, "finetune.seq_len", settings.seq_len)
    check_bias(settings, stored_dtype(config, recipe))
    model = loading.skeleton(folder, recipe)
    if settings.checkpoint_activations:
        check_checkpointing(model)
    matrices = allocate(find_blocks(model), recipe.prune)
    lora.targets(matrices, settings.targets)
    FINETUNE_METHODS.entry(settings.method).load().check(model, matrices, settings)


def check_bias(settings: Finetune, dtype: str) -> None:
    if settings.bias == "all" and "16" in dtype and precision(settings.precision) == "32-true":
        raise UserError("finetune.bias=all trains in float32: set finetune.precision=bf16-mixed, or dtype=float32")


def load(folder: Path, recipe: Recipe) -> nn.Module:
    """The pruned model in its training dtype.

    A float32 copy per process would not fit into the host memory of an 8-GPU node. So the model is converted on its GPU, and
    with FSDP it stays a view of its files until `sharding.shard_` converts it layer by layer.
    """
    settings, quantized = recipe.finetune, quantization.configuration(recipe.finetune.quantize)
    sharded, device = settings.strategy == "fsdp" and processes.world_size() > 1, processes.device()
    if trains_in_float32(settings) and (sharded or device.type == "cuda"):
        model = loading.load(folder, recipe)
        # not with 16-bit buffers: those computed at construction, such as Gemma's embedding scale, are already rounded
        if all(buffer.dtype.itemsize != 2 for buffer in model.buffers()):
            return model if sharded else in_float32(model.to(device))
    dtype = weights_dtype(settings, stored_dtype(loading.config(folder, recipe), recipe))
    model = loading.load(folder, recipe, dtype, quantized)
    quantization.keep_layout_(model)
    return model


def load_teacher(folder: Path, recipe: Recipe) -> nn.Module:
    """The dense model in the dtype of frozen weights."""
    stored = stored_dtype(loading.config(folder, recipe), recipe)
    return loading.load(folder, recipe, frozen_dtype(recipe.finetune, stored))


def stored_dtype(config: PreTrainedConfig, recipe: Recipe) -> str:
    """The dtype of the weights as loaded, without conversion."""
    return str(config.dtype or "float32").removeprefix("torch.") if recipe.dtype == "auto" else recipe.dtype


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/` (if the method's entry has `leaves_model`), `metrics.csv` and, for a LoRA, `adapter/`."""
    settings, method = recipe.finetune, FINETUNE_METHODS.entry(recipe.finetune.method)
    origin, masks_file = inputs.get("reconstruct", inputs["prune"]) / "model", inputs["prune"] / "masks.safetensors"
    masks = Masks.load(masks_file)
    batch_per_process(settings, processes.world_size())  # raises before the model is loaded

    pruned = load(origin, recipe)
    loading.check_length(pruned.config, "finetune.seq_len", settings.seq_len)
    task = tasks.of(pruned.config)
    processor, seed = task.processor(origin, recipe), recipe.seed
    source, *validation = sources.of_stage(recipe, "finetune")
    count = settings.max_steps * sequences_per_step(settings)
    samples, held_out = task.training(source, processor, pruned.config, settings, count, seed), None
    if validation:
        count = settings.validation_samples
        plain = dataclasses.replace(settings, augment=False)
        held_out = task.training(validation[0], processor, pruned.config, plain, count, 0)
    teacher = load_teacher(loading.dense_folder(recipe, inputs), recipe) if settings.distill else None
    with deterministic.training(recipe.deterministic):
        recovery = train(pruned, masks, samples, held_out, settings, seed, folder, teacher)

    recovery.save(folder, masks_file)
    if method.leaves_model:
        rewrite(origin, folder / "model", recipe, recovery.merged)
        processes.barrier()  # rank 0 has written
        violations = [m.violation for m in check_matrices(folder / "model", masks, recipe) if m.violation]
        assert not violations, violations
        if processes.is_main():
            images = classifies_images(pruned.config)
            card.write_model_card(folder / "model", recipe, "finetune", images, folder / "metrics.csv")


def train(
    model: nn.Module,
    masks: Masks,
    samples: Samples,
    validation: Samples | None,
    settings: Finetune,
    seed: int,
    folder: Path,
    teacher: nn.Module | None = None,
    checkpoints: bool = True,
) -> FinetuneMethod:
    """Trains the model with `finetune.method` on the samples in their order, and returns the method's object. Resumes from a
    checkpoint in `folder`."""
    torch.manual_seed(seed)  # for A; B starts at zero
    recovery = FINETUNE_METHODS.entry(settings.method).load()(model, masks, settings)
    held_out, measured = None, None
    if validation is not None:
        held_out = HeldOut(validation, settings.batch_size, settings.patience, folder)
        measured = Validation(held_out, settings.validate_every)
    checkpoint_every = settings.checkpoint_every if checkpoints else None
    callbacks = [MaskKeeper(recovery), *of_training(folder, checkpoint_every, measured)]
    fit(recovery.model, samples, settings, seed, folder, callbacks, teacher)
    if held_out:
        held_out.restore(recovery.model)
    assert recovery.reapply() == 0
    return recovery
