"""The short card of a model folder."""

import re
from pathlib import Path

from pipeline.reporting import page
from pipeline.reporting.summary import method_name, model_name, pattern_name, short
from pipeline.settings.schema import Recipe


def write_model_card(folder: Path, recipe: Recipe, stage: str) -> None:
    """README.md of the model that `stage` (prune, reconstruct or finetune) made: how it was made.

    Its results are not known yet, and a finished stage is not written to again.
    """
    text, prune, tune = recipe.calibration, recipe.prune, recipe.finetune
    name, pattern = short(model_name(recipe)), pattern_name(prune.sparsity)
    made = f"{name}, pruned with {method_name(recipe)} to {pattern}"
    made += f" ({text.samples} samples of {text.seq_len} tokens of {text.dataset})"
    if stage != "prune" and "reconstruct" in recipe.stages:
        made += ", its layers reconstructed"
    if stage == "finetune":
        how = "all kept weights" if tune.method == "full" else f"a LoRA of rank {tune.rank}, merged"
        made += f", then fine-tuned within its masks: {how}"
        made += f" ({tune.max_steps} steps of {tune.batch_size * tune.accumulate} x {tune.seq_len} tokens of {tune.dataset})"
    facts = {"base_model": on_hub(model_name(recipe)), "title": f"{name} {pattern}", "summary": f"{made}."}
    page.write(folder / "README.md", page.render("model_card.md.jinja", **facts))


def on_hub(model: str) -> str:
    """The model where it is the hub's, else nothing."""
    return model if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not Path(model).exists() else ""
