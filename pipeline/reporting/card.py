"""The Markdown files: the report, which is ready as a model card, and the short card of a model folder."""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.reporting import page, series, summary
from pipeline.reporting.summary import method_name, model_name, pattern_name, short
from pipeline.settings.schema import Recipe

Table = tuple[str, str, list[str], list[list[str]]]  # title, text, header, rows


def markdown(facts: dict[str, Any]) -> str:
    """What the page says, with tables in place of the pictures and front matter for the hub."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", facts["recipe"])), default=0))
    more = {"base_model": _on_hub(facts["model"]), "tables": _tables(facts), "fence": fence, "mark": summary.MARK}
    return page.render("report.md.jinja", **facts, **more)


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
    facts = {"base_model": _on_hub(model_name(recipe)), "title": f"{name} {pattern}", "summary": f"{made}."}
    page.write(folder / "README.md", page.render("model_card.md.jinja", **facts))


def _on_hub(model: str) -> str:
    """The model where it is the hub's, else nothing."""
    return model if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not Path(model).exists() else ""


def _tables(facts: dict[str, Any]) -> list[Table]:
    errors = series.by_type(facts["matrices"], "relative_output_error")
    spread = errors.agg(["min", "mean", "max"]).T.rename_axis("").reset_index() if len(errors) else errors
    layers = series.numbers(facts["layers"], "layer", "sparsity", "relative_output_error", "seconds")
    rebuilt = series.numbers(facts["reconstruction"], "layer", "error_before", "error_after", "seconds")
    tables = [
        ("Layers", "", *_cells(layers)),
        ("Matrices", "Relative output error over the layers:", *_cells(spread)),
        ("Reconstruction", "Relative output error of each layer:", *_cells(rebuilt)),
        ("Stages", "", facts["stage_header"], facts["stages"]),
    ]
    return [table for table in tables if table[-1]]


def _cells(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    rows = [[it if isinstance(it, str) else "-" if it != it else f"{it:.4g}" for it in row] for row in frame.values]
    return [name.replace("_", " ") for name in frame], rows
