"""The report as Markdown, ready as a model card, and the short card of a model folder: facts in, text out."""

import json
import re
from pathlib import Path
from typing import Any

from pipeline import registry
from pipeline.registry import ALLOCATIONS, FINETUNE_METHODS
from pipeline.reporting import series
from pipeline.reporting.summary import MARK, Cell, Groups, label_of, model_name, short
from pipeline.runtime import files
from pipeline.settings.schema import Recipe

SINCE = ", since it was last started"  # a resumed stage counts its last try
AS_ZEROS = "Pruned weights are stored as zeros: `from_pretrained` loads the model; its files are no smaller."


def markdown(facts: dict[str, Any]) -> str:
    """A model card: front matter for the hub, then what the page says, with tables in place of the pictures."""
    title = escaped(f"{facts['title']} {facts['pattern']}")
    parts = [_front(facts["model"]), f"# {title}", escaped(facts["headline"])]
    parts += [escaped(facts["cost"])] if facts["cost"] else []
    parts += [results(facts["columns"], facts["groups"])]
    parts += [escaped(facts[text]) for text in ("explained", "reference") if facts[text]]
    parts += [f"> **Note:** {escaped(note)}" for note in facts["notes"]]
    if "pruned" in facts["columns"]:
        parts.append(AS_ZEROS)
    parts += _continuations(facts["continuations"])
    if facts["layers"]:
        parts += ["## Layers", _table(facts["layers"], "layer", "sparsity", "relative_output_error", "seconds")]
    if errors := series.by_type(facts["matrices"], "relative_output_error"):
        cells = [[escaped(name), *(f"{error:.4g}" for error in _spread(points))] for name, points in errors.items()]
        parts += ["## Matrices", "Relative output error over the layers:", grid(["", "least", "mean", "most"], cells)]
    if facts["reconstruction"]:
        told = _table(facts["reconstruction"], "layer", "error_before", "error_after", "seconds")
        parts += ["## Reconstruction", "Relative output error of each layer:", told]
    if losses := series.points(facts["metrics"], "step", "loss"):
        first, last = (f"{loss:.3f} at step {step:.0f}" for step, loss in (losses[0], losses[-1]))
        parts += ["## Fine-tuning", f"Loss (nats per token): {first}, {last}."]
    if facts["stages"]:
        told = ("name", "time", "memory", "processes", "finished")
        header = ["stage", f"time{SINCE}", "peak memory", "processes", "finished (UTC)"]
        parts += ["## Stages", grid(header, [[stage[key] for key in told] for stage in facts["stages"]])]
    for title, pairs in (
        ("Weights of the layers", facts["coverage"]),
        ("Protocol", facts["protocol"]),
        ("What it was made with", facts["origin"]),
    ):
        if pairs:
            parts += [f"## {title}", "\n".join(f"- {escaped(key)}: {escaped(value)}" for key, value in pairs)]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", facts["recipe"])), default=0))
    parts += ["## Recipe", "Saved as `run.yaml`, this repeats the run: `accelerate launch launch.py recipe=run.yaml`"]
    return "\n\n".join([*parts, f"{fence}yaml\n{facts['recipe']}\n{fence}"]) + "\n"


def write_model_card(folder: Path, recipe: Recipe, stage: str) -> None:
    """README.md of the model that `stage` (prune, reconstruct or finetune) made.

    It is written by that stage, as a finished one stays as it is, so it tells what was done and not what came of it.
    """
    text, prune, tune = recipe.calibration, recipe.prune, recipe.finetune
    name, methods = short(model_name(recipe)), {"methods": registry.describe(recipe)}
    method, pattern, allocation = (
        label_of(recipe, f"prune.{key}", methods) for key in ("method", "sparsity", "allocation")
    )
    told = f"{name}, pruned with {method} to {pattern}"
    if ALLOCATIONS.entry(prune.allocation).shares_ratio:
        told += f" shared out by {allocation}"
    told += f" ({text.samples} samples of {text.seq_len} tokens of {text.dataset})"
    if stage != "prune" and "reconstruct" in recipe.stages:
        told += ", its layers reconstructed"
    if stage == "finetune":
        told += f", then fine-tuned within its masks: {FINETUNE_METHODS.entry(tune.method).in_words(tune)}"
        told += f" ({tune.max_steps} steps of {tune.batch_size * tune.accumulate} x {tune.seq_len} tokens of {tune.dataset})"
    where = "What it scores stands in the report of its run (`report/report.md`), with all settings."
    title = f"# {escaped(f'{name} {pattern}')}"
    parts = [_front(model_name(recipe)), title, escaped(f"{told}."), AS_ZEROS, where]
    with files.atomic_write(folder / "README.md") as tmp:
        tmp.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def results(columns: list[str], groups: Groups) -> str:
    """The table of all models: what separates a number from the dense model's stands in brackets behind it."""
    rows = []
    for title, group in groups:
        rows.append([f"**{escaped(title)}**", *[""] * len(columns)])
        rows += [[escaped(label), *map(_cell, cells)] for label, cells in group]
    return grid(["", *map(escaped, columns)], rows)


def escaped(text: str) -> str:
    """One line of Markdown that shows `text` as it stands, in a table too."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")


def grid(header: list[str], rows: list) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _front(model: str) -> str:
    """What the hub reads; `base_model` only where it is the hub's."""
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not Path(model).exists()
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [pruned, sparse, espalier]"]
    return "\n".join(["---", *front, *([f"base_model: {json.dumps(model)}"] if on_hub else []), "---"])


def _cell(cell: Cell) -> str:
    below = f" ({cell.difference}{MARK * cell.beyond})" if cell.difference else ""
    value = f"**{cell.value}**" if cell.strong else cell.value
    return value + below.replace(MARK, rf"\{MARK}")


def _continuations(told: list[tuple[str, list[tuple[str, str]]]]) -> list[str]:
    parts = ["## Continuations"] if told else []
    for prompt, texts in told:
        parts.append(f"> {escaped(prompt)}")
        parts.append("\n".join(f"- **{name}:** {escaped(text) or '(nothing)'}" for name, text in texts))
    return parts


def _table(rows: series.Rows, *columns: str) -> str:
    """Those of the columns that the rows have."""
    header = [column for column in columns if column in rows[0]]
    return grid([column.replace("_", " ") for column in header], [[_number(row, it) for it in header] for row in rows])


def _number(row: dict[str, str], key: str) -> str:
    value = series.number(row, key)
    return "-" if value is None else f"{value:.4g}"


def _spread(points: series.Points) -> tuple[float, float, float]:
    values = [value for _, value in points]
    return min(values), sum(values) / len(values), max(values)
