"""The finetune stage: trains a pruned model back to health, with its masks kept."""

from collections.abc import Callable
from pathlib import Path

import torch
from lightning import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor

from callbacks.mask_keeper import MaskKeeper
from callbacks.validation import Validation
from pipeline import card, data, files, lora, models, processes, quantize, sources
from pipeline.allocation import allocate
from pipeline.decoder import Decoder
from pipeline.errors import UserError
from pipeline.masks import Masks
from pipeline.recipe import Recipe
from pipeline.recovery import METHODS
from pipeline.training import fit, precision, sequences, share
from pipeline.validation_of_answers import ValidationOfAnswers


def check(recipe: Recipe) -> None:
    """Answers what does not go with the model (length, targets, dtype) before any work, as a `UserError`."""
    if "finetune" not in recipe.stages or recipe.model is None:
        return
    folder = models.locate(recipe.model, recipe.revision)
    config, settings = models.config(folder, recipe), recipe.finetune
    models.check_length(config, "finetune.seq_len", settings.seq_len)
    stored = str(config.dtype or "float32") if recipe.dtype == "auto" else recipe.dtype
    if settings.bias == "all" and "16" in stored and precision(settings.precision) == "32-true":
        raise UserError("finetune.bias=all trains in float32: type finetune.precision=bf16-mixed, or dtype=float32")
    if settings.targets != lora.ALL:
        lora.targets(allocate(Decoder(models.skeleton(folder, recipe)), recipe.prune), settings.targets)


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/`, `metrics.csv` and, for a LoRA, `adapter/`; a plain LoRA leaves no `model/`."""
    settings = recipe.finetune
    origin, masks_file = inputs.get("reconstruct", inputs["prune"]) / "model", inputs["prune"] / "masks.safetensors"
    masks, _ = Masks.load(masks_file)
    tokenizer = models.tokenizer(origin, recipe)
    share(settings, processes.world_size())  # refuses what cannot be shared before anything is read

    # a whole model trains in full precision: steps too small for bfloat16's 8 bits would be lost
    full = "float32" if settings.method == "full" and settings.precision != "bf16-true" else None
    pruned = models.load(origin, recipe, full, quantize.configuration(settings.quantize))
    models.check_length(pruned.config, "finetune.seq_len", settings.seq_len)
    source, *held_out = sources.of_stage(recipe, "finetune")
    samples = settings.max_steps * sequences(settings)
    windows_NT = data.packed(source, tokenizer, settings.seq_len, samples, recipe.seed, loss=settings.loss)
    ids_NT = data.ids_and_labels(windows_NT)[0] if settings.loss != "all" else windows_NT
    models.check_vocabulary(pruned.config, ids_NT, source)

    torch.manual_seed(recipe.seed)  # of A; B starts at zero
    recovery = METHODS[settings.method](pruned, masks, settings)
    callbacks: list[Callback] = [MaskKeeper(recovery)]
    validation = None
    if held_out:
        windows = data.packed(
            held_out[0], tokenizer, settings.seq_len, settings.validation_samples, 0, loss=settings.loss
        )
        kind = Validation if settings.loss == "all" else ValidationOfAnswers
        validation = kind(windows, settings.batch_size, settings.validate_every, settings.patience, folder)
        callbacks.insert(0, validation)
    teacher = models.load(models.dense_folder(recipe, inputs), recipe) if settings.distill else None
    fit(recovery.model, windows_NT, settings, recipe.seed, folder, callbacks, teacher)
    if validation:
        validation.restore(recovery.model)
    assert recovery.reapply() == 0

    recovery.save(folder, masks_file)
    if settings.method != "plain_lora":
        write_merged(recovery.merged, origin, folder / "model")
        if processes.is_main():
            violations = masks.violations(models.tensors(folder / "model"))
            assert not violations, violations
            card.write_model_card(folder / "model", recipe, "finetune")


def write_merged(merged: Callable[[str, Tensor], Tensor | None], origin: Path, target: Path) -> None:
    """`origin` shard by shard, with the weights that `merged(name, weight)` gives for it; None leaves one as it is.

    All ranks must call, since a weight may have to be put together from the parts that they hold; rank 0 writes.
    """
    for shard in sorted(origin.glob("*.safetensors")):
        weights = load_file(shard)
        for name, weight in weights.items():
            new = merged(name, weight)
            if new is not None and processes.is_main():
                weights[name] = new.detach().to(weight.dtype).cpu().contiguous()
        if processes.is_main():
            with files.whole(target / shard.name) as beside:
                save_file(weights, beside, {"format": "pt"})
    if processes.is_main():
        models.copy_beside(origin, target)
        models.write_index(target)
