"""Owns the comparison of runs.

One table over methods x patterns x models, on the terminal and as compare.html and compare.md, and one plot of it.
"""

import math
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from pipeline.reporting import card, page, runs, summary
from pipeline.reporting.report import table
from pipeline.reporting.runs import Row, Run
from pipeline.reporting.series import Mark, Panel
from pipeline.reporting.summary import MODELS, NOTHING, Cell, Groups

PERPLEXITY = "perplexity"


class Comparison(NamedTuple):
    patterns: list[str]  # the columns
    rows: list[Row]
    measures: list[str]
    values: dict[tuple[Row, str, str], tuple[float, float | None]]  # by row, pattern, measure: value, standard error
    explained: str
    notes: list[str]


def compare(folders: list[Path], out: Path) -> None:
    """Shows the table of all runs in `folders`, each a run or a folder of runs, and writes it into `out`."""
    found = runs.find(folders)
    comparison = arrange(found, runs.unfinished(folders))
    groups, console = groups_of(comparison), Console()
    console.print(table(comparison.patterns, groups))
    for note in comparison.notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    write(out, comparison, groups, [str(run.folder) for run in found])
    console.print(Text(f"comparison: {out / 'compare.html'}"), soft_wrap=True)


def arrange(found: list[Run], unfinished: list[str]) -> Comparison:
    """All numbers by row, pattern and measure; a method stands before what healed it, the dense model before all."""
    patterns = list(dict.fromkeys(run.pattern for run in found))
    models = [(run, state, run.results["models"][state]) for run in found for state in summary.columns(run.results)]
    tasks = [task for task in _asked(models) if all("acc" in _scores(model, task) for _, _, model in models)]
    values, notes = {}, [note for run in found for note in summary.notes(run.results)]
    for run, state, model in models:
        row = runs.row_of(run, state, found)
        for measure, value in _measured(model, tasks).items():
            for pattern in patterns if state == "dense" else [run.pattern]:
                before = values.setdefault((row, pattern, measure), value)
                if not math.isclose(before[0], value[0], rel_tol=1e-4):
                    notes.append(
                        f"{row.model} {row.label}: runs of equal settings differ in {measure}; the first is told"
                    )
    if differing := runs.differing_protocol(found):
        told = ", ".join(f"evaluate.{key}" for key in differing)
        notes.append(f"not all was measured alike: numbers of another {told} do not compare")
    if left := [task for task in _asked(models) if task not in tasks]:
        notes.append(f"not in the mean accuracy, as not all runs tell theirs: {', '.join(left)}")
    if unfinished:
        notes.append(f"not finished: {', '.join(unfinished)}")
    rows = list(dict.fromkeys(row for row, _, _ in values))
    names, methods = [row.model for row in rows], [row.method for row in rows]
    rows.sort(
        key=lambda it: (names.index(it.model), it.state != "dense", methods.index(it.method), MODELS.index(it.state))
    )
    measures = list(dict.fromkeys(measure for _, _, measure in values))
    return Comparison(patterns, rows, measures, values, _explained(found, tasks), list(dict.fromkeys(notes)))


def groups_of(comparison: Comparison) -> Groups:
    """A group of rows for each measure of each model. Strong is the best pruned and the best healed of a column."""
    models = list(dict.fromkeys(row.model for row in comparison.rows))
    groups = []
    for measure in comparison.measures:
        for model in models:
            rows = [row for row in comparison.rows if row.model == model]
            told = [
                (row.label, [_cell(comparison, rows, row, it, measure) for it in comparison.patterns]) for row in rows
            ]
            where = f"{model}, " if len(models) > 1 else ""
            better = "lower" if PERPLEXITY in measure else "higher"
            groups.append((f"{where}{measure} ({better} is better)", told))
    return groups


def write(out: Path, comparison: Comparison, groups: Groups, folders: list[str]) -> None:
    """compare.html, compare.md, and the plot of the latter, compare.svg."""
    from pipeline.reporting import plots, svg  # matplotlib takes a second to import

    models = list(dict.fromkeys(row.model for row in comparison.rows))
    title = f"{', '.join(models)}: {len(folders)} run{'s' * (len(folders) > 1)} compared"
    panels = [_panel(comparison, model, measure) for model in models for measure in comparison.measures]
    facts = {"title": title, "columns": comparison.patterns, "groups": groups, "explained": comparison.explained}
    facts |= {"notes": comparison.notes, "runs": folders}
    pictures = [(panel.title, Markup(plots.comparison([panel]))) for panel in panels]
    text = [f"# {card.escaped(title)}", card.results(comparison.patterns, groups), card.escaped(comparison.explained)]
    text += ["![The table as a plot](compare.svg)", *(f"> **Note:** {card.escaped(note)}" for note in comparison.notes)]
    text.append(f"Runs: {card.escaped(', '.join(folders))}")
    page.write(
        out,
        {
            "compare.html": page.render("compare.html.jinja", **facts, figures=pictures, mark=summary.MARK),
            "compare.md": "\n\n".join(text) + "\n",
            "compare.svg": svg.standalone(plots.comparison(panels)),
        },
    )


def _explained(found: list[Run], tasks: list[str]) -> str:
    said = ["Strong: the best pruned and the best healed model of a column. ±: standard error."]
    if tasks:
        said.append(f"Mean accuracy of {', '.join(tasks)}.")
    if not runs.differing_protocol(found):
        protocol = found[0].results.get("protocol", {})
        limit = "all" if protocol.get("limit") is None else protocol["limit"]
        windows = f", the first {protocol['windows']} of each text" if protocol.get("windows") else ""
        bos = ", each after BOS" if protocol.get("bos") else ""
        said.append(f"Windows of {protocol.get('seq_len')} tokens{windows}{bos}; {limit} questions per task.")
    return " ".join(said)


def _measured(model: dict, tasks: list[str]) -> dict[str, tuple[float, float | None]]:
    """Value and standard error of each measure; of the mean accuracy, in percent, as of independent tasks."""
    errors = model.get("perplexity_stderr") or {}
    found = {f"{it} {PERPLEXITY}": (value, errors.get(it)) for it, value in (model.get("perplexity") or {}).items()}
    if tasks:
        scores = [_scores(model, task) for task in tasks]
        mean = sum(score["acc"] for score in scores) / len(scores)
        error = summary.mean_error(scores)
        found["mean accuracy, %"] = (100 * mean, None if error is None else 100 * error)
    return found


def _cell(comparison: Comparison, rows: list[Row], row: Row, pattern: str, measure: str) -> Cell:
    if (row, pattern, measure) not in comparison.values:
        return NOTHING
    value, error = comparison.values[row, pattern, measure]
    rivals = [it for it in rows if it.state != "dense" and bool(it.healing) == bool(row.healing)]
    reached = [found[0] for it in rivals if (found := comparison.values.get((it, pattern, measure)))]
    is_best = row in rivals and len(reached) > 1 and value == (min if PERPLEXITY in measure else max)(reached)
    if PERPLEXITY in measure:
        return Cell(summary.perplexity(value, error), strong=is_best)
    return Cell(f"{value:.1f}" + (f" ± {error:.1f}" if error is not None else ""), strong=is_best)


def _panel(comparison: Comparison, model: str, measure: str) -> Panel:
    dense, marks = None, []
    for row in (row for row in comparison.rows if row.model == model):
        numbers = {it: comparison.values.get((row, it, measure)) for it in comparison.patterns}
        drawn = {it: number for it, number in numbers.items() if number and math.isfinite(number[0])}
        if drawn and row.state == "dense":
            dense = dense or next(iter(drawn.values()))
        elif drawn:
            marks.append(Mark(row.method, row.healing, drawn))
    several = len({row.model for row in comparison.rows}) > 1
    return Panel(f"{model}, {measure}" if several else measure, comparison.patterns, dense, marks)


def _asked(models: list) -> list[str]:
    return summary.keys(model.get("zero_shot") for _, _, model in models)


def _scores(model: dict, task: str) -> dict:
    return (model.get("zero_shot") or {}).get(task) or {}
