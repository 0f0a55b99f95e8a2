"""Owns the report: what the other stages left on disk, told as report.html, report.md and a table on the terminal.

Imports no torch, and matplotlib only to draw, so that the table on the terminal is there at once.
"""

import math
import os
from pathlib import Path
from typing import Any

from markupsafe import Markup
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import files, page, published, series, summary
from pipeline.card import SINCE, markdown
from pipeline.recipe import STAGES, Recipe, plain

PROTOCOL = {"seq_len": "tokens per window", "limit": "questions per task", "fewshot": "examples per question"}
TOLD_ELSEWHERE = ("datasets", "notes", "prompts", "masks")  # of the protocol


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes report.html and report.md into `folder`; the same inputs give the same bytes."""
    if os.environ.get("RANK", "0") != "0":  # processes.is_main() would import lightning
        return
    facts = collect(recipe, inputs)
    html = page.render("report.html.jinja", **facts, figures=figures(facts), mark=summary.MARK)
    page.write(folder, {"report.html": html, "report.md": markdown(facts)})


def show(run_dir: Path, console: Console | None = None) -> None:
    """Prints the table of a run, its notes, and where the report lies."""
    console = console or Console()
    results = files.read_json(run_dir / "evaluate" / "results.json")
    assert results is not None, f"{run_dir}: evaluate has not finished"
    groups = summary.groups(results)
    console.print(table(summary.columns(results), groups))
    if any(cell.beyond for _, rows in groups for _, cells in rows for cell in cells):
        console.print(Text(f"{summary.MARK} differs from dense by more than two standard errors of the difference"))
    for note in summary.notes(results):
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    console.print(Text(f"report: {run_dir / 'report' / 'report.html'}"), soft_wrap=True)


def table(columns: list[str], groups: summary.Groups) -> Table:
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("", overflow="fold")
    for name in columns:
        shown.add_column(Text(name), justify="right", no_wrap=True)
    for title, rows in groups:
        shown.add_row(Text(title, style="green"))
        for label, cells in rows:
            shown.add_row(
                Text(f"  {label}"), *(Text(cell.marked, style="bold" if cell.strong else "") for cell in cells)
            )
    return shown


def collect(recipe: Recipe, inputs: dict[str, Path]) -> dict[str, Any]:
    """All that the report tells, as plain data; what belongs to a stage that did not run is empty."""
    results = files.read_json(inputs["evaluate"] / "results.json")
    assert results is not None, f"{inputs['evaluate']}: no results.json"
    models, protocol = results["models"], results.get("protocol") or {}
    found = {name: files.read_json(folder / "stage.json") for name, folder in inputs.items()}
    about = {name: stage for name, stage in found.items() if stage}
    reference, source = published.find(recipe, protocol)
    groups = summary.groups(results, reference)
    settings = [(PROTOCOL.get(key, key), value) for key, value in protocol.items() if key not in TOLD_ELSEWHERE]
    machines = list(dict.fromkeys(stage["machine"] for stage in about.values() if "machine" in stage))
    systems = list(dict.fromkeys(stage["system"] for stage in about.values() if "system" in stage))
    seconds = sum(stage["seconds"] for stage in about.values())
    cost = f"It took {summary.duration(seconds)} on {'; '.join(machines)}." if machines else ""
    versions: dict[str, list[str]] = {}
    for libraries in [*(stage.get("versions") or {} for stage in about.values()), results.get("versions") or {}]:
        for package, version in libraries.items():
            if str(version) not in versions.setdefault(package, []):
                versions[package].append(str(version))
    hashes = [(f"{name} model", models[name]["hash"]) for name in summary.columns(results) if "hash" in models[name]]
    hashes += [("masks", str(protocol["masks"]))] if protocol.get("masks") else []
    used = {key: value for key, value in plain(recipe).items() if key not in STAGES or key in recipe.stages}
    return {
        "model": summary.model_name(recipe),
        "title": summary.short(summary.model_name(recipe)),
        "pattern": str(recipe.prune.sparsity) if "pruned" in models else "",
        "headline": summary.headline(recipe, results),
        "cost": cost,
        "columns": summary.columns(results),
        "groups": groups,
        "explained": summary.explained(groups),
        "reference": f"Published: {source}." if reference else "",
        "notes": summary.notes(results),
        "layers": _rows(inputs, "prune", "layers.csv"),
        "matrices": _rows(inputs, "prune", "matrices.csv"),
        "metrics": _rows(inputs, "finetune", "metrics.csv"),
        "continuations": [
            (
                prompt,
                [(name, texts[place]) for name in summary.columns(results) if (texts := _texts(models[name], place))],
            )
            for place, prompt in enumerate(protocol.get("prompts") or [])
        ],
        "stages": [
            {
                "name": name,
                "seconds": stage["seconds"],
                "time": summary.duration(stage["seconds"]),
                "memory_gib": stage.get("memory_gib"),
                "memory": f"{stage['memory_gib']:.2f} GiB" if "memory_gib" in stage else "-",
                "processes": stage["processes"],
                "finished": stage["finished"][:16].replace("T", " "),
            }
            for name, stage in about.items()
        ],
        "protocol": [(key, "all" if value is None else str(value)) for key, value in settings]
        + [(name, str(text)) for name, text in (protocol.get("datasets") or {}).items()],
        "origin": [
            ("seed", str(recipe.seed)),
            *(("hardware", machine) for machine in machines),
            *(("system", system) for system in systems),
            *((package, ", ".join(found)) for package, found in sorted(versions.items())),
            *((f"hash of the {name}", value) for name, value in hashes),
        ],
        "recipe": OmegaConf.to_yaml(used).strip(),
    }


def figures(facts: dict[str, Any]) -> list[tuple[str, Markup]]:
    """(caption, inline SVG) of all that there are numbers for."""
    from pipeline import plots  # matplotlib takes a second to import

    drawn = []
    # a run of an older version logged layers only
    sparsity = series.by_type(facts["matrices"], "sparsity") or _named("layer", facts["layers"], "sparsity")
    errors = series.by_type(facts["matrices"], "relative_output_error") or _named(
        "mean", facts["layers"], "relative_output_error"
    )
    if sparsity:
        drawn.append(("Pruned weights of each layer, by matrix", plots.sparsity(series.together(sparsity))))
    if errors:
        drawn.append(("Output error of each layer, by matrix", plots.output_error(errors)))
    if losses := series.points(facts["metrics"], "step", "loss"):
        held_out = [(step, math.log(it)) for step, it in series.points(facts["metrics"], "step", "val_perplexity")]
        drawn.append(("Loss while fine-tuning", plots.loss(losses, held_out)))
    if stages := facts["stages"]:
        told = [[stage[key] for stage in stages] for key in ("name", "seconds", "memory_gib")]
        drawn.append((f"Time of each stage{SINCE}, and peak memory of one process", plots.stages(*told)))
    return [(caption, Markup(svg)) for caption, svg in drawn]


def _named(name: str, rows: series.Rows, column: str) -> dict[str, series.Points]:
    found = series.points(rows, "layer", column)
    return {name: found} if found else {}


def _texts(model: dict, place: int) -> list[str]:
    """A model's continuations, where it has one for this prompt."""
    texts = model.get("continuations") or []
    return texts if place < len(texts) else []


def _rows(inputs: dict[str, Path], stage: str, name: str) -> series.Rows:
    return series.read(inputs[stage] / name) if stage in inputs else []
