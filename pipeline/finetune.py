"""The finetune stage: a masked LoRA on the pruned model, merged into one that is exactly as sparse."""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from callbacks.mask_keeper import MaskKeeper
from pipeline import card, data, files, lora, models, processes, sources
from pipeline.masks import Masks
from pipeline.recipe import Recipe
from pipeline.training import Schedule, fit


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/`, `adapter/` and `metrics.csv`."""
    settings = recipe.finetune
    origin, masks_file = inputs["prune"] / "model", inputs["prune"] / "masks.safetensors"
    masks, _ = Masks.load(masks_file)
    tokenizer = models.tokenizer(origin, recipe)
    schedule = Schedule(
        settings.max_steps,
        settings.batch_size,
        settings.accumulate,
        settings.lr,
        settings.warmup,
        settings.weight_decay,
        settings.clip,
        settings.precision,
        settings.checkpoint_every,
        recipe.seed,
    )
    schedule.share(processes.world_size())

    dense = models.load(origin, recipe)
    models.check_length(dense.config, "finetune.seq_len", settings.seq_len)
    source = sources.source(settings.dataset, recipe.mirror, settings.split, settings.config)
    samples = schedule.max_steps * schedule.sequences
    windows_NT = data.packed(source, tokenizer, settings.seq_len, samples, recipe.seed)
    models.check_vocabulary(dense.config, windows_NT, source)

    torch.manual_seed(recipe.seed)  # of A; B starts at zero
    model = lora.attach(dense, masks, settings)
    keeper = MaskKeeper(lambda: lora.refresh_all(model))
    fit(model, windows_NT, schedule, folder, [keeper])
    if processes.is_main():
        lora.save_adapter(model, masks_file, folder / "adapter")
        write_merged(model, masks, origin, folder / "model")
        card.write_model_card(folder / "model", recipe, "finetune")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def write_merged(model: PeftModel, masks: Masks, origin: Path, target: Path) -> None:
    """`origin` shard by shard, with the adapted matrices replaced by the weights that forward used."""
    merged = lora.masked_layers(model)
    for shard in sorted(origin.glob("*.safetensors")):
        weights = load_file(shard)
        for name in weights.keys() & merged.keys():
            weights[name] = merged[name].merged_weight().to(weights[name].dtype).cpu().contiguous()
        with files.whole(target / shard.name) as beside:
            save_file(weights, beside, {"format": "pt"})
    models.copy_beside(origin, target)
    models.write_index(target)
    violations = masks.violations(models.tensors(target))
    assert not violations, violations
