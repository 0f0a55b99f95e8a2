"""Owns the report: what the other stages left on disk, told as report.html, report.md and a table on the terminal.

Imports no torch, and matplotlib only to draw, so that the table on the terminal is there at once.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markupsafe import Markup
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.engine import coverage
from pipeline.reporting import page, published, series, summary
from pipeline.reporting.card import SINCE, markdown
from pipeline.runtime import checksums, files
from pipeline.settings.schema import STAGES, Recipe, plain

PROTOCOL = {
    **{"seq_len": "tokens per window", "limit": "questions per task", "fewshot": "examples per question"},
    **{"windows": "windows of each text", "bos": "each window begins with BOS"},
}
TOLD_ELSEWHERE = ("datasets", "notes", "prompts", "masks")  # of the protocol


def write(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes report.html and report.md into `folder`; the same inputs give the same bytes."""
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
    found = {name: checksums.read(folder) for name, folder in inputs.items()}
    about = {name: stage for name, stage in found.items() if stage}
    reference, source = published.find(recipe, protocol)
    groups = summary.groups(results, reference)
    machines = _once(stage.get("machine") for stage in about.values())
    cost = f"It took {summary.duration(sum(stage['seconds'] for stage in about.values()))} on {'; '.join(machines)}."
    used = {key: value for key, value in plain(recipe).items() if key not in STAGES or key in recipe.stages}
    del used["rerun"]  # of this one command
    return {
        "model": summary.model_name(recipe),
        "title": summary.short(summary.model_name(recipe)),
        "pattern": str(recipe.prune.sparsity) if "pruned" in models else "",
        "headline": summary.headline(recipe, results),
        "cost": cost if machines else "",
        "columns": summary.columns(results),
        "groups": groups,
        "explained": summary.explained(groups),
        "reference": f"Published: {source}." if reference else "",
        "notes": summary.notes(results),
        "coverage": coverage.told(_rows(inputs, "prune", "coverage.csv")),
        "layers": _rows(inputs, "prune", "layers.csv"),
        "matrices": _rows(inputs, "prune", "matrices.csv"),
        "reconstruction": _rows(inputs, "reconstruct", "layers.csv"),
        "metrics": _rows(inputs, "finetune", "metrics.csv"),
        "continuations": _continuations(results),
        "stages": [_stage(name, stage) for name, stage in about.items()],
        "protocol": _protocol(protocol),
        "origin": _origin(recipe, results, about),
        "recipe": OmegaConf.to_yaml(used).strip(),
    }


def figures(facts: dict[str, Any]) -> list[tuple[str, Markup]]:
    """(caption, inline SVG) of all that there are numbers for."""
    from pipeline.reporting import plots  # matplotlib takes a second to import

    drawn = []
    if sparsity := series.by_type(facts["matrices"], "sparsity"):
        drawn.append(("Pruned weights of each layer, by matrix", plots.sparsity(series.together(sparsity))))
    if errors := series.by_type(facts["matrices"], "relative_output_error"):
        drawn.append(("Output error of each layer, by matrix", plots.output_error(errors)))
    if before := series.points(facts["reconstruction"], "layer", "error_before"):
        after = series.points(facts["reconstruction"], "layer", "error_after")
        drawn.append(
            ("Output error of each layer, before and after its reconstruction", plots.reconstruction(before, after))
        )
    if losses := series.points(facts["metrics"], "step", "loss"):
        held_out = [(step, math.log(it)) for step, it in series.points(facts["metrics"], "step", "val_perplexity")]
        drawn.append(("Loss while fine-tuning", plots.loss(losses, held_out)))
    if stages := facts["stages"]:
        told = [[stage[key] for stage in stages] for key in ("name", "seconds", "time", "memory_gib")]
        drawn.append((f"Time of each stage{SINCE}, and peak memory of one process", plots.stages(*told)))
    return [(caption, Markup(svg)) for caption, svg in drawn]


def _continuations(results: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, [(model, what it wrote)])."""
    wrote = {name: results["models"][name].get("continuations") or [] for name in summary.columns(results)}
    prompts = (results.get("protocol") or {}).get("prompts") or []
    return [
        (prompt, [(name, texts[place]) for name, texts in wrote.items() if place < len(texts)])
        for place, prompt in enumerate(prompts)
    ]


def _stage(name: str, about: dict) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": about["seconds"],
        "time": summary.duration(about["seconds"]),
        "memory_gib": about.get("memory_gib"),
        "memory": f"{about['memory_gib']:.2f} GiB" if "memory_gib" in about else "-",
        "processes": about["processes"],
        "finished": about["finished"][:16].replace("T", " "),
    }


def _protocol(protocol: dict) -> list[tuple[str, str]]:
    told = [(PROTOCOL.get(key, key), value) for key, value in protocol.items() if key not in TOLD_ELSEWHERE]
    texts = [(name, str(text)) for name, text in (protocol.get("datasets") or {}).items()]
    words = {None: "all", True: "yes", False: "no"}
    return [
        (key, words[value] if value is None or isinstance(value, bool) else str(value)) for key, value in told
    ] + texts


def _origin(recipe: Recipe, results: dict, about: dict[str, dict]) -> list[tuple[str, str]]:
    """What a run must agree in to be this one: seed, machine, versions, and the hashes of what came out."""
    told = [("seed", str(recipe.seed))]
    for key, name in (("machine", "hardware"), ("system", "system")):
        told += [(name, value) for value in _once(stage.get(key) for stage in about.values())]
    libraries = [*(stage.get("versions") or {} for stage in about.values()), results.get("versions") or {}]
    for package in sorted(summary.keys(libraries)):
        told.append((package, ", ".join(_once(versions.get(package) for versions in libraries))))
    hashes = {f"{name} model": results["models"][name].get("hash") for name in summary.columns(results)}
    hashes["masks"] = (results.get("protocol") or {}).get("masks")
    return told + [(f"hash of the {name}", str(value)) for name, value in hashes.items() if value]


def _once(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value))


def _rows(inputs: dict[str, Path], stage: str, name: str) -> series.Rows:
    return series.read(inputs[stage] / name) if stage in inputs else []
