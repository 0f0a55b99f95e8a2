"""The finetune stage: trains a pruned model back to health, with its masks kept."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch import Tensor, nn

from callbacks import of_training
from callbacks.mask_keeper import MaskKeeper
from callbacks.validation import Validation
from pipeline.data import sources, token_windows
from pipeline.engine.blocks import find_blocks
from pipeline.models import loading
from pipeline.models.rewrite import parameters, rewrite
from pipeline.pruning.allocation import allocate
from pipeline.recovery import lora, quantization
from pipeline.recovery.methods import METHODS
from pipeline.recovery.training import fit, precision, sequences, share
from pipeline.reporting import card
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune, Recipe
from pipeline.sparsity.masks import Masks


def check(recipe: Recipe) -> None:
    """Answers what does not go with the model (length, targets, dtype) before any work, as a `UserError`."""
    if "finetune" not in recipe.stages or recipe.model is None:
        return
    folder = loading.locate(recipe.model, recipe.revision)
    config, settings = loading.config(folder, recipe), recipe.finetune
    loading.check_length(config, "finetune.seq_len", settings.seq_len)
    check_bias(settings, str(config.dtype or "float32") if recipe.dtype == "auto" else recipe.dtype)
    if settings.targets != lora.ALL:
        lora.targets(allocate(find_blocks(loading.skeleton(folder, recipe)), recipe.prune), settings.targets)


def check_bias(settings: Finetune, dtype: str) -> None:
    if settings.bias == "all" and "16" in dtype and precision(settings.precision) == "32-true":
        raise UserError("finetune.bias=all trains in float32: set finetune.precision=bf16-mixed, or dtype=float32")


def trains_in_float32(settings: Finetune) -> bool:
    """Whether the whole model does: of what trains itself, steps too small for bfloat16's 8 bits would be lost."""
    return settings.method == "full" and settings.precision != "bf16-true"


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/`, `metrics.csv` and, for a LoRA, `adapter/`; a plain LoRA leaves no `model/`."""
    settings = recipe.finetune
    origin, masks_file = inputs.get("reconstruct", inputs["prune"]) / "model", inputs["prune"] / "masks.safetensors"
    masks = Masks.load(masks_file)
    tokenizer = loading.tokenizer(origin, recipe)
    share(settings, processes.world_size())  # refuses what cannot be shared before anything is read

    full = "float32" if trains_in_float32(settings) else None
    pruned = loading.load(origin, recipe, full, quantization.configuration(settings.quantize))
    loading.check_length(pruned.config, "finetune.seq_len", settings.seq_len)
    source, *held_out = sources.of_stage(recipe, "finetune")
    samples = settings.max_steps * sequences(settings)
    windows_NT = token_windows.packed(source, tokenizer, settings.seq_len, samples, recipe.seed, loss=settings.loss)
    ids_NT = token_windows.ids_and_labels(windows_NT)[0] if settings.loss != "all" else windows_NT
    loading.check_vocabulary(pruned.config, ids_NT, source)

    held_out_NT = None
    if held_out:
        held_out_NT = token_windows.packed(
            held_out[0], tokenizer, settings.seq_len, settings.validation_samples, 0, loss=settings.loss
        )
    teacher = loading.load(loading.dense_folder(recipe, inputs), recipe) if settings.distill else None
    recovery = train(pruned, masks, windows_NT, held_out_NT, settings, recipe.seed, folder, teacher)

    recovery.save(folder, masks_file)
    if recovery.merges:
        rewrite(origin, folder / "model", recipe, recovery.merged)
        if processes.is_main():
            violations = masks.violations(parameters(folder / "model", recipe))
            assert not violations, violations
            card.write_model_card(folder / "model", recipe, "finetune")


def train(
    model: nn.Module,
    masks: Masks,
    windows_NT: Tensor,
    held_out_NT: Tensor | None,
    settings: Finetune,
    seed: int,
    folder: Path,
    teacher: nn.Module | None = None,
    checkpoints: bool = True,
) -> Any:
    """What `METHODS` made of the model, trained on the windows in their order; goes on from a checkpoint in `folder`."""
    torch.manual_seed(seed)  # of A; B starts at zero
    recovery = METHODS[settings.method](model, masks, settings)
    every = settings.checkpoint_every if checkpoints else None
    callbacks: list[Callback] = [MaskKeeper(recovery), *of_training(folder, every)]
    validation = None
    if held_out_NT is not None:
        validation = Validation(held_out_NT, settings.batch_size, settings.validate_every, settings.patience, folder)
        callbacks.insert(0, validation)
    fit(recovery.model, windows_NT, settings, seed, folder, callbacks, teacher)
    if validation:
        validation.restore(recovery.model)
    assert recovery.reapply() == 0
    return recovery
