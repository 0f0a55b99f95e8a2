"""Owns the report: what the other stages left on disk, told as report.html, report.md and a table on the terminal.

Imports no torch, and matplotlib only to draw, so that the table on the terminal is there at once.
"""

import csv
import math
import os
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
from pipeline.card import SINCE, markdown
from pipeline.recipe import STAGES, Recipe
from pipeline.summary import columns, duration, groups, headline, model_name, notes, points

PROTOCOL = {"seq_len": "tokens per window", "limit": "questions per task", "fewshot": "examples per question"}
LISTS = ("datasets", "notes")  # of the protocol


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
    console.print(Text(f"report: {run_dir / 'report' / 'report.html'}"), soft_wrap=True)


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
    if drawable := points(layers, "layer", "sparsity"):
        drawn.append(("Sparsity of each layer", plots.layer_sparsity(drawable)))
    if drawable := points(layers, "layer", "relative_output_error"):
        drawn.append(("Output error of each layer, mean of its matrices", plots.layer_error(drawable)))
    if drawable := points(metrics, "step", "loss"):
        held_out = [(step, math.log(value)) for step, value in points(metrics, "step", "val_perplexity")]
        drawn.append(("Loss while fine-tuning", plots.loss(drawable, held_out)))
    if facts["stages"]:
        drawn.append((f"Time of each stage{SINCE}", plots.stage_times([stage[:3] for stage in facts["stages"]])))
    return [(caption, Markup(svg)) for caption, svg in drawn]


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
