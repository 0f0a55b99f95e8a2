"""Owns the report: what the other stages left on disk, told as report.html, report.md and a table on the terminal.

Imports no torch, and matplotlib only to draw, so that the table on the terminal is there at once.
"""

import csv
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import files
from pipeline.recipe import STAGES, Recipe

MODELS = ("dense", "pruned", "finetuned")
METHODS = {"wanda": "Wanda", "lora": "LoRA"}
PROTOCOL = {"seq_len": "tokens per window", "limit": "questions per task", "fewshot": "examples per question"}
SHARES = ("acc", "exact_match", "zero_shot_mean")  # metrics in 0..1, by their beginnings
SINCE = ", since it was last started"  # a resumed stage counts its last try
LISTS = ("datasets", "notes")  # of the protocol
Groups = list[tuple[str, list[tuple[str, list[str]]]]]  # (title, rows), a row being (label, a cell per model)


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes report.html and report.md into `folder`; the same inputs give the same bytes."""
    if os.environ.get("RANK", "0") != "0":  # processes.is_main() would import lightning
        return
    facts = collect(recipe, inputs)
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    html = environment.get_template("report.html.jinja").render(facts, figures=figures(facts))
    for name, text in (("report.html", html), ("report.md", markdown(facts))):
        with files.whole(folder / name) as beside:
            beside.write_text(text, encoding="utf-8")


def show(run_dir: Path, console: Console | None = None) -> None:
    """Prints the table of a run, its notes, and where the report lies."""
    console = console or Console()
    results = files.read_json(run_dir / "evaluate" / "results.json")
    assert results is not None, f"{run_dir}: evaluate has not finished"
    console.print(table(results))
    for note in notes(results):
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    places = (run_dir / "report.html", run_dir / "report" / "report.html")
    if found := [place for place in places if place.exists()]:
        console.print(Text(f"report: {found[0]}"), soft_wrap=True)


def table(results: dict) -> Table:
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("", overflow="fold")
    for name in columns(results):
        shown.add_column(name, justify="right", no_wrap=True)
    for title, rows in groups(results):
        shown.add_row(Text(title, style="green"))
        for label, cells in rows:
            shown.add_row(Text(f"  {label}"), *map(Text, cells))
    return shown


def columns(results: dict) -> list[str]:
    return [name for name in MODELS if name in results["models"]]


def groups(results: dict) -> Groups:
    """All rows of the table, as text; what no model has is left out."""
    models = [results["models"][name] for name in columns(results)]
    fewshot = results.get("protocol", {}).get("fewshot") or 0
    language, tasks, weights = [], [], []
    for dataset in _keys(model.get("perplexity") for model in models):
        values = [(model.get("perplexity") or {}).get(dataset) for model in models]
        language.append((dataset, [perplexity(value) for value in values]))
        if len(values) == len(MODELS) and (back := won_back(*values)) is not None:
            language.append((f"{dataset}, won back (log)", ["", "", f"{back:.0%}"]))
    for task in _keys(model.get("zero_shot") for model in models):
        scores = [(model.get("zero_shot") or {}).get(task) or {} for model in models]
        for metric in (key for key in _keys(scores) if not key.endswith("_stderr")):
            label = task if metric == "acc" else f"{task}, {metric}"
            label += "" if metric.startswith(SHARES) else " (not in %)"
            tasks.append((label, [accuracy(score, metric) for score in scores]))
    if any(model.get("zero_shot_mean") is not None for model in models):
        tasks.append(("mean", [accuracy(model, "zero_shot_mean") for model in models]))
    sparsity = [(model.get("sparsity") or {}).get("overall") for model in models]
    if any(value is not None for value in sparsity):
        weights.append(("sparsity, %", ["-" if value is None else f"{100 * value:.2f}" for value in sparsity]))
    violations = [model.get("mask_violations") for model in models]
    if any(value is not None for value in violations):
        weights.append(("mask violations", ["-" if value is None else str(value) for value in violations]))
    shots = f"{fewshot}-shot" if fewshot else "Zero-shot"
    titles = ("Perplexity (lower is better)", f"{shots}, % (higher is better)", "Weights")
    return [(title, rows) for title, rows in zip(titles, (language, tasks, weights), strict=True) if rows]


def notes(results: dict) -> list[str]:
    """What a reader must know before believing the table."""
    broken = [
        f"{name}: {count} pruned weights are not zero, so the mask was not kept"
        for name in columns(results)
        if (count := results["models"][name].get("mask_violations"))
    ]
    return broken + list(results.get("protocol", {}).get("notes") or [])


def won_back(dense: float | None, pruned: float | None, finetuned: float | None) -> float | None:
    """(ln pruned - ln finetuned) / (ln pruned - ln dense): 1 is all of the lost log-perplexity, below 0 a further loss.

    None where pruning lost nothing, or a perplexity is missing or not finite.
    """
    if any(value is None or not math.isfinite(value) for value in (dense, pruned, finetuned)) or pruned <= dense:
        return None
    return math.log(pruned / finetuned) / math.log(pruned / dense)


def perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.2e}"


def accuracy(scores: dict, metric: str) -> str:
    """`61.2 ± 1.0` in percent; a metric that is not a share of the questions stays in its own unit."""
    value, error = scores.get(metric), scores.get(f"{metric}_stderr")
    if not isinstance(value, int | float):
        return "-"
    if not metric.startswith(SHARES):
        return f"{value:.4g}"
    known = isinstance(error, int | float)
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if known else "")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"


def headline(recipe: Recipe, results: dict) -> str:
    """One sentence: what was pruned, how, to what sparsity, what that cost and what came back."""
    models, sentence = results["models"], model_name(recipe)
    if "pruned" in models:
        overall = (models["pruned"].get("sparsity") or {}).get("overall")
        share = "" if overall is None else f" ({overall:.2%} of the prunable weights are zero)"
        method = METHODS.get(recipe.prune.method, recipe.prune.method)
        sentence += f", pruned with {method} to {recipe.prune.sparsity}{share},"
    dataset = next(iter(_keys(model.get("perplexity") for model in models.values())), None)
    if dataset:
        kind, write = f"{dataset} perplexity", perplexity
        scores = [(models.get(name, {}).get("perplexity") or {}).get(dataset) for name in MODELS]
    else:
        kind, write = "mean zero-shot accuracy in %", lambda value: f"{100 * value:.1f}"
        scores = [models.get(name, {}).get("zero_shot_mean") for name in MODELS]
    said = [write(value) for value in scores if value is not None]
    if not said:
        return f"{sentence} was evaluated."
    if len(said) == 1 or None in scores[:2]:
        return f"{sentence} has a {kind} of {' and '.join(said)}."
    sentence += f" went from a {kind} of {said[0]} to {said[1]}"
    if len(said) == 3:
        method = METHODS.get(recipe.finetune.method, recipe.finetune.method)
        sentence += f"; {method} fine-tuning for {recipe.finetune.max_steps} steps brought it to {said[2]}"
        if dataset and (back := won_back(*scores)) is not None:
            sentence += f" and won back {back:.0%} of the lost log-perplexity" if back > 0 else " and won nothing back"
    return f"{sentence}."


def model_name(recipe: Recipe) -> str:
    shape = recipe.pretrain
    return recipe.model or f"A small Llama trained here ({shape.layers} layers, {shape.hidden_size} wide)"


def collect(recipe: Recipe, inputs: dict[str, Path]) -> dict[str, Any]:
    """All that the report tells, as plain data; what belongs to a stage that did not run is empty."""
    results = files.read_json(inputs["evaluate"] / "results.json")
    assert results is not None, f"{inputs['evaluate']}: no results.json"
    about = {name: files.read_json(folder / "stage.json") or {} for name, folder in inputs.items()}
    protocol = results.get("protocol") or {}
    settings = [(PROTOCOL.get(key, key), value) for key, value in protocol.items() if key not in LISTS]
    written = OmegaConf.to_container(OmegaConf.structured(recipe))
    used = {key: value for key, value in written.items() if key not in STAGES or key in recipe.stages}
    versions: dict[str, list[str]] = {}
    for source in [*(stage.get("versions") or {} for stage in about.values()), results.get("versions") or {}]:
        for package, version in source.items():
            if str(version) not in versions.setdefault(package, []):
                versions[package].append(str(version))
    return {
        "model": model_name(recipe),
        "pattern": str(recipe.prune.sparsity) if "pruned" in results["models"] else "",
        "headline": headline(recipe, results),
        "columns": columns(results),
        "groups": groups(results),
        "notes": notes(results),
        "layers": _rows(inputs, "prune", "layers.csv"),
        "metrics": _rows(inputs, "finetune", "metrics.csv"),
        "stages": [
            (name, it["seconds"], duration(it["seconds"]), it["processes"], it["finished"][:16].replace("T", " "))
            for name, it in about.items()
            if it
        ],
        "protocol": [(key, "all" if value is None else str(value)) for key, value in settings]
        + [(name, str(text)) for name, text in (protocol.get("datasets") or {}).items()],
        "versions": [(package, ", ".join(found)) for package, found in sorted(versions.items())],
        "recipe": OmegaConf.to_yaml(used).strip(),
    }


def figures(facts: dict[str, Any]) -> list[tuple[str, Markup]]:
    """(caption, inline SVG) of all that there are numbers for."""
    from pipeline import plots  # matplotlib takes a second to import

    layers, metrics, drawn = facts["layers"], facts["metrics"], []
    if points := _points(layers, "layer", "sparsity"):
        drawn.append(("Sparsity of each layer", plots.layer_sparsity(points)))
    if points := _points(layers, "layer", "relative_output_error"):
        drawn.append(("Output error of each layer, mean of its matrices", plots.layer_error(points)))
    if points := _points(metrics, "step", "loss"):
        held_out = [(step, math.log(value)) for step, value in _points(metrics, "step", "val_perplexity")]
        drawn.append(("Loss while fine-tuning", plots.loss(points, held_out)))
    if facts["stages"]:
        drawn.append((f"Time of each stage{SINCE}", plots.stage_times([stage[:3] for stage in facts["stages"]])))
    return [(caption, Markup(svg)) for caption, svg in drawn]


def markdown(facts: dict[str, Any]) -> str:
    """A model card: front matter for the hub, then what the page says, with tables in place of the pictures."""
    name, pattern = facts["model"], facts["pattern"]
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists()
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [pruned, sparse, espalier]"]
    front += [f"base_model: {json.dumps(name)}"] if on_hub else []
    parts = ["\n".join(["---", *front, "---"]), f"# {_escaped(f'{name} {pattern}')}", _escaped(facts["headline"])]
    rows = []
    for title, group in facts["groups"]:
        rows.append([f"**{_escaped(title)}**", *[""] * len(facts["columns"])])
        rows += [[_escaped(label), *cells] for label, cells in group]
    parts += [_grid(["", *facts["columns"]], rows), *(f"> **Note:** {_escaped(note)}" for note in facts["notes"])]
    if "pruned" in facts["columns"]:
        parts.append("Pruned weights are stored as zeros: `from_pretrained` loads the model; its files are no smaller.")
    if facts["layers"]:
        known = _keys(facts["layers"])
        header = [column for column in ("layer", "sparsity", "relative_output_error", "seconds") if column in known]
        cells = [[f"{row[column]:.4g}" if column in row else "-" for column in header] for row in facts["layers"]]
        parts += ["## Layers", _grid([column.replace("_", " ") for column in header], cells)]
    if losses := _points(facts["metrics"], "step", "loss"):
        first, last = (f"{loss:.3f} at step {step:.0f}" for step, loss in (losses[0], losses[-1]))
        parts += ["## Fine-tuning", f"Loss (nats per token): {first}, {last}."]
    if facts["stages"]:
        cells = [[stage, *told] for stage, _, *told in facts["stages"]]
        parts += ["## Stages", _grid(["stage", f"time{SINCE}", "processes", "finished (UTC)"], cells)]
    for title, pairs in (("Protocol", facts["protocol"]), ("Versions", facts["versions"])):
        if pairs:
            parts += [f"## {title}", "\n".join(f"- {_escaped(key)}: {_escaped(value)}" for key, value in pairs)]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", facts["recipe"])), default=0))
    return "\n\n".join([*parts, "## Recipe", f"{fence}yaml\n{facts['recipe']}\n{fence}"]) + "\n"


def _escaped(text: str) -> str:
    """One line of Markdown that shows `text` as it stands, in a table too."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")


def _grid(header: list[str], rows: list) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _keys(tables: Any) -> list[str]:
    """The keys of several dicts (or None), once each, in their order."""
    return list(dict.fromkeys(key for table in tables for key in table or {}))


def _rows(inputs: dict[str, Path], stage: str, name: str) -> list[dict[str, float]]:
    """A CSV's rows with their numbers by header; empty cells and text are left out, and so is a missing file."""
    path = inputs[stage] / name if stage in inputs else Path()
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: float(cell) for key, cell in row.items() if _is_number(cell)} for row in csv.DictReader(file)]


def _is_number(cell: Any) -> bool:
    try:
        return math.isfinite(float(cell))
    except (TypeError, ValueError):
        return False


def _points(rows: list[dict[str, float]], x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in rows if x in row and y in row]
