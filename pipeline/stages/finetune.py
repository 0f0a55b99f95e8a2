"""The finetune stage: trains a pruned model back to health, with its masks kept."""

from pathlib import Path

import torch
from lightning import Callback

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
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks


def check(recipe: Recipe) -> None:
    """Answers what does not go with the model (length, targets, dtype) before any work, as a `UserError`."""
    if "finetune" not in recipe.stages or recipe.model is None:
        return
    folder = loading.locate(recipe.model, recipe.revision)
    config, settings = loading.config(folder, recipe), recipe.finetune
    loading.check_length(config, "finetune.seq_len", settings.seq_len)
    stored = str(config.dtype or "float32") if recipe.dtype == "auto" else recipe.dtype
    if settings.bias == "all" and "16" in stored and precision(settings.precision) == "32-true":
        raise UserError("finetune.bias=all trains in float32: set finetune.precision=bf16-mixed, or dtype=float32")
    if settings.targets != lora.ALL:
        lora.targets(allocate(find_blocks(loading.skeleton(folder, recipe)), recipe.prune), settings.targets)


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/`, `metrics.csv` and, for a LoRA, `adapter/`; a plain LoRA leaves no `model/`."""
    settings = recipe.finetune
    origin, masks_file = inputs.get("reconstruct", inputs["prune"]) / "model", inputs["prune"] / "masks.safetensors"
    masks = Masks.load(masks_file)
    tokenizer = loading.tokenizer(origin, recipe)
    share(settings, processes.world_size())  # refuses what cannot be shared before anything is read

    # a whole model trains in full precision: steps too small for bfloat16's 8 bits would be lost
    full = "float32" if settings.method == "full" and settings.precision != "bf16-true" else None
    pruned = loading.load(origin, recipe, full, quantization.configuration(settings.quantize))
    loading.check_length(pruned.config, "finetune.seq_len", settings.seq_len)
    source, *held_out = sources.of_stage(recipe, "finetune")
    samples = settings.max_steps * sequences(settings)
    windows_NT = token_windows.packed(source, tokenizer, settings.seq_len, samples, recipe.seed, loss=settings.loss)
    ids_NT = token_windows.ids_and_labels(windows_NT)[0] if settings.loss != "all" else windows_NT
    loading.check_vocabulary(pruned.config, ids_NT, source)

    torch.manual_seed(recipe.seed)  # of A; B starts at zero
    recovery = METHODS[settings.method](pruned, masks, settings)
    callbacks: list[Callback] = [MaskKeeper(recovery), *of_training(folder, settings.checkpoint_every)]
    validation = None
    if held_out:
        windows = token_windows.packed(
            held_out[0], tokenizer, settings.seq_len, settings.validation_samples, 0, loss=settings.loss
        )
        validation = Validation(windows, settings.batch_size, settings.validate_every, settings.patience, folder)
        callbacks.insert(0, validation)
    teacher = loading.load(loading.dense_folder(recipe, inputs), recipe) if settings.distill else None
    fit(recovery.model, windows_NT, settings, recipe.seed, folder, callbacks, teacher)
    if validation:
        validation.restore(recovery.model)
    assert recovery.reapply() == 0

    recovery.save(folder, masks_file)
    if settings.method != "plain_lora":
        rewrite(origin, folder / "model", recipe, recovery.merged)
        if processes.is_main():
            violations = masks.violations(parameters(folder / "model", recipe))
            assert not violations, violations
            card.write_model_card(folder / "model", recipe, "finetune")
