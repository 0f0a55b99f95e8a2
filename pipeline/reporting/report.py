"""The report of a run: what the other stages left on disk, as report.html, report.md and a table on the terminal.

Imports no torch, and matplotlib only to draw, so that the table on the terminal is there at once.
"""

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.engine import coverage
from pipeline.reporting import card, page, published, series, summary
from pipeline.runtime import checksums, files
from pipeline.settings.schema import STAGES, Recipe, plain

PROTOCOL = {
    **{"seq_len": "tokens per window", "limit": "questions per task", "fewshot": "examples per question"},
    **{"windows": "windows of each text", "bos": "each window begins with BOS"},
}
SHOWN_ELSEWHERE = ("datasets", "notes", "prompts", "masks")  # of the protocol
LAST_START = "since it was last started"  # a resumed stage counts its last try
WORDS = {None: "all", True: "yes", False: "no"}


def write(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes report.html and report.md into `folder`; the same inputs give the same bytes."""
    facts = collect(recipe, inputs)
    page.write(folder / "report.md", card.markdown(facts))
    page.write(
        folder / "report.html", page.render("report.html.jinja", **facts, figures=figures(facts), mark=summary.MARK)
    )


def show(run_dir: Path, console: Console | None = None) -> None:
    """Prints the table of a run, its notes, and the path of the report."""
    results = files.read_json(run_dir / "evaluate" / "results.json")
    assert results is not None, f"{run_dir}: evaluate has not finished"
    print_table(summary.columns(results), summary.groups(results), summary.notes(results), console)
    (console or Console()).print(Text(f"report: {run_dir / 'report' / 'report.html'}"), soft_wrap=True)


def print_table(columns: list[str], groups: summary.Groups, notes: list[str], console: Console | None = None) -> None:
    console, table = console or Console(), Table(box=box.SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for title, rows in groups:
        table.add_row(Text(title, style="green"))
        for label, cells in rows:
            texts = [cell.value + summary.MARK * cell.significant for cell in cells]
            styles = ["bold" if cell.best else "" for cell in cells]
            table.add_row(Text(f"  {label}"), *map(Text, texts, styles))
    console.print(table)
    if any(cell.significant for _, rows in groups for _, cells in rows for cell in cells):
        console.print(Text(f"{summary.MARK} differs from dense by more than two standard errors of the difference"))
    for note in notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def collect(recipe: Recipe, inputs: dict[str, Path]) -> dict[str, Any]:
    """All that the report shows, as plain data; what belongs to a stage that did not run is empty."""
    results = files.read_json(inputs["evaluate"] / "results.json")
    assert results is not None, f"{inputs['evaluate']}: no results.json"
    protocol = results.get("protocol") or {}
    about = {name: stage for name, folder in inputs.items() if (stage := checksums.read(folder))}
    reference, source = published.find(recipe, protocol)
    groups = summary.groups(results, reference)
    times = [summary.duration(stage["seconds"]) for stage in about.values()]
    machines, total = (
        _once(stage.get("machine") for stage in about.values()),
        sum(it["seconds"] for it in about.values()),
    )
    used = {key: value for key, value in plain(recipe).items() if key not in STAGES or key in recipe.stages}
    loss = series.points(_rows(inputs, "finetune", "metrics.csv"), "step", "loss")
    first_and_last = loss.iloc[[0, -1]] if len(loss) else loss
    lists = {
        "Fine-tuning loss": [(f"step {step:.0f}", f"{it:.3f} nats per token") for step, it in first_and_last.items()],
        "Weights of the layers": coverage.told(_rows(inputs, "prune", "coverage.csv")),
        "Protocol": _protocol(protocol),
        "Environment": _environment(recipe, results, about),
    }
    return {
        "model": summary.model_name(recipe),
        "title": summary.short(summary.model_name(recipe)),
        "pattern": summary.pattern_name(recipe.prune.sparsity) if "pruned" in results["models"] else "",
        "headline": summary.headline(recipe, results),
        "cost": f"It took {summary.duration(total)} on {'; '.join(machines)}." if machines else "",
        "columns": summary.columns(results),
        "groups": groups,
        "explained": summary.EXPLAINED,
        "reference": f"Published: {source}." if reference else "",
        "notes": summary.notes(results),
        "layers": _rows(inputs, "prune", "layers.csv"),
        "matrices": _rows(inputs, "prune", "matrices.csv"),
        "reconstruction": _rows(inputs, "reconstruct", "layers.csv"),
        "metrics": _rows(inputs, "finetune", "metrics.csv"),
        "loss": loss,
        "continuations": _continuations(results),
        "costs": [(it["seconds"], time, it.get("memory_gib")) for it, time in zip(about.values(), times)],
        "stage_header": ["stage", f"time, {LAST_START}", "peak memory", "processes", "finished (UTC)"],
        "stages": [
            [
                name,
                time,
                f"{it['memory_gib']:.2f} GiB" if "memory_gib" in it else "-",
                it["processes"],
                it["finished"][:16].replace("T", " "),
            ]
            for (name, it), time in zip(about.items(), times)
        ],
        "lists": [(title, pairs) for title, pairs in lists.items() if pairs],
        "recipe": OmegaConf.to_yaml(used).strip(),
    }


def figures(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(caption, image as a data URI) of all that there are numbers for."""
    from pipeline.reporting import plots  # matplotlib takes a second to import

    drawn = {}
    if len(sparsity := series.by_type(facts["matrices"], "sparsity")):
        drawn["Pruned weights of each layer, by matrix"] = plots.by_layer(
            series.merge_equal(sparsity), "pruned weights (%)", 100
        )
    if len(errors := series.by_type(facts["matrices"], "relative_output_error")):
        drawn["Output error of each layer, by matrix"] = plots.by_layer(
            errors, "output error (% of the norm)", 110 * errors.max(axis=None) or 100
        )
    if len(before := series.points(facts["reconstruction"], "layer", "error_before")):
        after = series.points(facts["reconstruction"], "layer", "error_after")
        drawn["Output error of each layer, before and after reconstruction"] = plots.reconstruction(before, after)
    if len(facts["loss"]):
        validation = np.log(series.points(facts["metrics"], "step", "val_perplexity"))
        drawn["Fine-tuning loss"] = plots.loss(facts["loss"], validation)
    if facts["stages"]:
        names = [stage[0] for stage in facts["stages"]]
        caption = f"Time of each stage ({LAST_START}) and peak memory of one process"
        drawn[caption] = plots.stages(names, *zip(*facts["costs"]))
    return [(caption, data_uri(svg)) for caption, svg in drawn.items()]


def data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _continuations(results: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, [(model, its text)])."""
    texts = {name: results["models"][name].get("continuations") or [] for name in summary.columns(results)}
    prompts = (results.get("protocol") or {}).get("prompts") or []
    return [
        (prompt, [(name, of_model[place]) for name, of_model in texts.items() if place < len(of_model)])
        for place, prompt in enumerate(prompts)
    ]


def _protocol(protocol: dict) -> list[tuple[str, str]]:
    settings = {PROTOCOL.get(key, key): value for key, value in protocol.items() if key not in SHOWN_ELSEWHERE}
    pairs = settings | (protocol.get("datasets") or {})
    return [(key, WORDS[it] if it is None or isinstance(it, bool) else str(it)) for key, it in pairs.items()]


def _environment(recipe: Recipe, results: dict, about: dict[str, dict]) -> list[tuple[str, str]]:
    """What a run must agree in to be the same: seed, machine, versions, and the hashes of its models and masks."""
    pairs = [("seed", str(recipe.seed))]
    for key, name in (("machine", "hardware"), ("system", "system")):
        pairs += [(name, value) for value in _once(stage.get(key) for stage in about.values())]
    libraries = [*(stage.get("versions") or {} for stage in about.values()), results.get("versions") or {}]
    for package in sorted(summary.keys(libraries)):
        pairs.append((package, ", ".join(_once(versions.get(package) for versions in libraries))))
    hashes = {f"{name} model": results["models"][name].get("hash") for name in summary.columns(results)}
    hashes["masks"] = (results.get("protocol") or {}).get("masks")
    return pairs + [(f"hash of the {name}", str(value)) for name, value in hashes.items() if value]


def _once(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value))


def _rows(inputs: dict[str, Path], stage: str, name: str) -> series.Rows:
    return series.read(inputs[stage] / name) if stage in inputs else []
