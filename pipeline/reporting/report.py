"""The report of a run: what the other stages left on disk, as report.html, report.md and a table on the terminal.

Imports no torch, and matplotlib only to draw, so that the table on the terminal is there at once.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.engine import coverage
from pipeline.reporting import card, costs, headline, image_answers, page, published, series, summary
from pipeline.runtime import checksums, files
from pipeline.settings.schema import STAGES, Recipe, plain

PROTOCOL = {
    **{"seq_len": "tokens per window", "limit": "questions per task", "fewshot": "examples per question"},
    **{"windows": "windows of each text", "bos": "each window begins with BOS"},
}
SHOWN_ELSEWHERE = ("datasets", "notes", "prompts", "masks")  # of the protocol
LAST_START = "since it was last started"  # a resumed stage counts its last try
LOGS = {
    **{name: ("prune", f"{name}.csv") for name in ("layers", "matrices", "coverage")},
    "channels": ("permute", "channels.csv"),
    **{"reconstruction": ("reconstruct", "layers.csv"), "metrics": ("finetune", "metrics.csv")},
}
Section = tuple[str, list[str], list]  # title, and header and rows of its table
WORDS = {None: "all", True: "yes", False: "no"}


def write(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes report.html, and report.md as a model card, into `folder`; the same inputs give the same bytes."""
    facts, logs, about = collect(recipe, inputs)
    classes = image_answers.by_class(files.read_json(inputs["evaluate"] / "results.json") or {"models": {}})
    drawn = figures(logs, about, costs.measures(*costs.read(inputs)), classes)
    text = page.render("report.md.jinja", **facts, figures=drawn)
    page.write(folder / "report.html", page.html(text, title=f"{facts['title']} {facts['pattern']}", kind="report"))
    # for the hub; tables in place of the pictures
    facts["tables"] = _tables(logs, classes) + facts["tables"]
    matter = {"base_model": card.on_hub(summary.model_name(recipe)), "images": bool(recipe.evaluate.accuracy)}
    front = page.render("front.md.jinja", **matter)
    page.write(folder / "report.md", f"{front}\n{page.render('report.md.jinja', **facts, figures=[])}")


def show(run_dir: Path, console: Console | None = None, stages: Iterable[str] = ()) -> None:
    """Prints the table of a run, what its `stages` found of size and speed, its notes, and the path of the report."""
    results = files.read_json(run_dir / "evaluate" / "results.json")
    assert results is not None, f"{run_dir}: evaluate has not finished"
    print_table(summary.columns(results), summary.groups(results), summary.notes(results), console)
    header, rows = costs.table(*costs.read({name: run_dir / name for name in stages}), spread=False)
    if rows:
        print_table(
            header[1:],
            [("Size and speed", [(label, list(map(summary.Cell, cells))) for label, *cells in rows])],
            [],
            console,
        )
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
    # in 80 columns the labels of a table with five models would vanish
    if (needed := 24 + 14 * len(columns)) > console.width and len(columns) > 4:
        console.width = needed
    console.print(table)
    if any(cell.significant for _, rows in groups for _, cells in rows for cell in cells):
        console.print(Text(f"{summary.MARK} differs from dense by more than two standard errors of the difference"))
    for note in notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def collect(recipe: Recipe, inputs: dict[str, Path]) -> tuple[dict[str, Any], dict[str, series.Rows], dict[str, dict]]:
    """What the report shows, what the stages logged, and what they cost; what belongs to no stage of this run is empty."""
    results = files.read_json(inputs["evaluate"] / "results.json")
    assert results is not None, f"{inputs['evaluate']}: no results.json"
    about = {name: stage for name, folder in inputs.items() if (stage := checksums.read(folder))}
    logs = {name: series.read(inputs[it] / file) if it in inputs else [] for name, (it, file) in LOGS.items()}
    reference, source = published.find(recipe, results.get("protocol") or {})
    machines = _once(stage.get("machine") for stage in about.values())
    total = summary.duration(sum(stage["seconds"] for stage in about.values()))
    used = {key: value for key, value in plain(recipe).items() if key not in STAGES or key in recipe.stages}
    del used["rerun"]  # of this one command
    text = OmegaConf.to_yaml(used).strip()
    sizes, speed = costs.read(inputs)
    stages = ["stage", f"time, {LAST_START}", "peak memory", "processes", "finished (UTC)"]
    tables = [
        ("Stages", stages, [[name, *_cost(stage)] for name, stage in about.items()]),
        ("Weights of the layers", ["", ""], coverage.describe(logs["coverage"])),
        ("Importance that the pattern keeps", ["inputs of", "original order", "permuted"], _channels(logs["channels"])),
        ("Products by shape of the matrix", *(costs.products(speed) if speed else ([], []))),
        ("Forms of the pruned matrices on the GPU", *(costs.forms(speed) if speed else ([], []))),
        ("Protocol", ["", ""], _protocol(results.get("protocol") or {})),
        ("Environment", ["", ""], _environment(recipe, results, about)),
    ]
    facts = {
        "title": summary.short(summary.model_name(recipe)),
        "pattern": summary.label_of(recipe, "prune.sparsity", results) if "pruned" in results["models"] else "",
        "headline": f"{headline.headline(recipe, results, logs['metrics'])} {costs.headline(sizes, speed)}".strip(),
        "cost": f"It took {total} on {'; '.join(machines)}." if machines else "",
        "columns": summary.columns(results),
        "groups": summary.groups(results, reference),
        "mark": summary.MARK,
        "remarks": [summary.EXPLAINED, *([f"Published: {source}."] if reference else [])],
        "notes": summary.notes(results),
        "costs": costs.table(sizes, speed),
        "circumstances": costs.circumstances(speed) if speed else [],
        "share": f"{costs.size_ratio(sizes):.2f}" if sizes else "",
        "with_export": ",".join(stage for stage in STAGES if stage in recipe.stages or stage in ("export", "speed")),
        "continuations": _continuations(results),
        "examples": image_answers.examples(inputs["evaluate"]),
        "tables": [table for table in tables if table[-1]],
        "recipe": text,
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0)),
    }
    return facts, logs, about


def _channels(rows: series.Rows) -> list[list[str]]:
    """The share kept before and after channels were reordered, the mean over the layers of each type of matrix."""
    shares = [series.by_type(rows, key).mean() for key in ("kept_before", "kept_after")] if rows else []
    return [[name, *(f"{share[name]:.4f}" for share in shares)] for name in shares[0].index] if shares else []


def _tables(logs: dict[str, series.Rows], classes: dict[str, pd.DataFrame]) -> list[Section]:
    """What the pictures show, in numbers."""
    errors = series.by_type(logs["matrices"], "relative_output_error")
    spread = errors.agg(["min", "mean", "max"]).T.rename_axis("").reset_index() if len(errors) else errors
    loss = series.numbers(logs["metrics"], "step", "loss").dropna()
    rebuilt = series.numbers(logs["reconstruction"], "layer", "error_before", "error_after", "seconds")
    frames = {
        "Layers": series.numbers(logs["layers"], "layer", "sparsity", "relative_output_error", "seconds"),
        "Relative output error of each matrix over the layers": spread,
        "Relative output error of each layer, before and after reconstruction": rebuilt,
        "Fine-tuning loss (nats)": loss.iloc[[0, -1]] if len(loss) else loss,
        **{caption: image_answers.table(frame) for caption, frame in classes.items()},
    }
    return [
        (title, [name.replace("_", " ") for name in rows], _cells(rows)) for title, rows in frames.items() if len(rows)
    ]


def _cells(frame: pd.DataFrame) -> list[list[str]]:
    return [
        [value if isinstance(value, str) else "-" if value != value else f"{value:.4g}" for value in row]
        for row in frame.values
    ]


def figures(
    logs: dict[str, series.Rows],
    about: dict[str, dict],
    measured: list[costs.Measure],
    classes: dict[str, pd.DataFrame],
) -> list[tuple[str, str]]:
    """(caption, image as a data URI) of all that there are numbers for."""
    from pipeline.reporting import plots  # matplotlib takes a second to import

    drawn = {}
    sparsity, errors = (series.by_type(logs["matrices"], key) for key in ("sparsity", "relative_output_error"))
    before, after = (series.points(logs["reconstruction"], "layer", f"error_{when}") for when in ("before", "after"))
    loss, perplexity = (series.points(logs["metrics"], "step", key) for key in ("loss", "val_perplexity"))
    drawn |= {caption: plots.by_class(frame) for caption, frame in classes.items()}
    if len(sparsity):
        svg = plots.by_layer(series.merge_equal(sparsity), "pruned weights (%)", 100)
        drawn["Pruned weights of each layer, by matrix"] = svg
    if len(errors):
        svg = plots.by_layer(errors, "output error (% of the norm)", 110 * errors.max(axis=None) or 100)
        drawn["Output error of each layer, by matrix"] = svg
    if len(before):
        drawn["Output error of each layer, before and after reconstruction"] = plots.reconstruction(before, after)
    if len(loss):
        drawn["Fine-tuning loss"] = plots.loss(loss, np.log(perplexity))
    if measured:
        drawn["The compact model against the ordinary one"] = plots.ratios(
            [(ratio.label.rpartition(",")[0], ratio.ratios()[0], ratio.more_is_better) for ratio in measured]
        )
    if about:
        seconds, gib = ([stage.get(key) for stage in about.values()] for key in ("seconds", "memory_gib"))
        svg = plots.stages(list(about), seconds, list(map(summary.duration, seconds)), gib)
        drawn[f"Time of each stage ({LAST_START}) and peak memory of one process"] = svg
    return [(caption, page.data_uri(svg)) for caption, svg in drawn.items()]


def _continuations(results: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, [(model, its text)])."""
    texts = {name: results["models"][name].get("continuations") or [] for name in summary.columns(results)}
    prompts = (results.get("protocol") or {}).get("prompts") or []
    return [
        (prompt, [(name, of_model[place]) for name, of_model in texts.items() if place < len(of_model)])
        for place, prompt in enumerate(prompts)
    ]


def _cost(about: dict) -> list[str]:
    memory = f"{about['memory_gib']:.2f} GiB" if "memory_gib" in about else "-"
    return [summary.duration(about["seconds"]), memory, about["processes"], about["finished"][:16].replace("T", " ")]


def _protocol(protocol: dict) -> list[tuple[str, str]]:
    settings = [(PROTOCOL.get(key, key), value) for key, value in protocol.items() if key not in SHOWN_ELSEWHERE]
    pairs = [*settings, *(protocol.get("datasets") or {}).items()]
    return [(key, WORDS[value] if value is None or isinstance(value, bool) else str(value)) for key, value in pairs]


def _environment(recipe: Recipe, results: dict, about: dict[str, dict]) -> list[tuple[str, str]]:
    """What a run must agree in to be the same: seed, machine, versions, and the hashes of its models and masks."""
    pairs = []
    for key, entry in (results.get("methods") or {}).items():
        words = ". ".join(text for text in (entry["description"], entry["citation"]) if text)
        pairs.append((key, f"{entry['label']}: {words}" if words else entry["label"]))
    pairs.append(("seed", str(recipe.seed)))
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
