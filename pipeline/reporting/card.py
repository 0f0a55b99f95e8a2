"""The short card of a model folder."""

import re
from pathlib import Path

from pipeline import registry
from pipeline.registry import ALLOCATIONS, FINETUNE_METHODS
from pipeline.reporting import page, series
from pipeline.reporting.summary import label_of, model_name, pruned_with, short
from pipeline.settings.schema import Recipe


def write_model_card(
    folder: Path, recipe: Recipe, stage: str, images: bool, metrics: Path | None = None, compact: bool = False
) -> None:
    """README.md of the model that `stage` (prune, reconstruct or finetune) made, or of its compact folder: how it was made.
    Its results are not known yet, and a finished stage is not written to again.

    `images`: whether it is an image classifier, by `architecture.classifies_images`, which needs torch. `metrics`: the log of
    the fine-tuning.
    """
    text, prune, tune = recipe.calibration, recipe.prune, recipe.finetune
    name, methods = short(model_name(recipe)), {"methods": registry.describe(recipe)}
    pattern, allocation = (label_of(recipe, f"prune.{key}", methods) for key in ("sparsity", "allocation"))
    reordered = "its channels reordered, " if "permute" in recipe.stages else ""
    made = f"{name}, {reordered}pruned with {pruned_with(recipe, methods)} to {pattern}"
    if ALLOCATIONS.entry(prune.allocation).shares_ratio:
        made += f" shared out by {allocation}"
    samples = "images" if images else f"samples of {text.seq_len} tokens"
    made += f" ({text.samples} {samples} of {text.dataset})"
    if stage != "prune" and "reconstruct" in recipe.stages:
        made += ", its layers reconstructed"
    if stage == "finetune":
        made += f", then fine-tuned within its masks: {FINETUNE_METHODS.entry(tune.method).in_words(tune)}"
        each = "images" if images else f"x {tune.seq_len} tokens"
        steps = series.steps(series.read(metrics) if metrics else [], tune.max_steps)
        best = ", of which the best weights were kept" if tune.patience else ""
        made += f" ({steps} steps of {tune.batch_size * tune.accumulate} {each} of {tune.dataset}{best})"
    facts = {"base_model": on_hub(model_name(recipe)), "title": f"{name} {pattern}", "summary": f"{made}."}
    facts |= {"compact": compact, "rounded": recipe.export.values != "exact", "images": images}
    page.write(folder / "README.md", page.render("model_card.md.jinja", **facts))


def on_hub(model: str) -> str:
    """The model if it is a hub id, else nothing."""
    return model if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not Path(model).exists() else ""
