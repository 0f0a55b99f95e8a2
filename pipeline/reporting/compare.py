"""Compares finished runs: a table over methods, patterns and models, on the terminal and as compare.html and compare.md, and
plots."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.text import Text

from pipeline.reporting import costs, page, runs, summary
from pipeline.reporting.report import print_table
from pipeline.reporting.runs import Run
from pipeline.reporting.summary import Cell, get
from pipeline.runtime.errors import UserError

PERPLEXITY = "perplexity"
SIZE, SPEED = "size on disk, × of the ordinary folder", f"decode speed, × of the ordinary folder, batch {costs.BATCH}"
LOWER = (PERPLEXITY, SIZE)  # in the name of a measure where lower is better


def compare(folders: list[Path], out: Path) -> None:
    """Prints the table of all runs in `folders`, each a run or a folder of runs, and writes it into `out`."""
    from pipeline.reporting import plots  # matplotlib takes a second to import

    found = runs.find(folders)
    scores = [model.get("zero_shot") or {} for run in found for model in run.results["models"].values()]
    tasks = [task for task in summary.keys(scores) if all("acc" in (score.get(task) or {}) for score in scores)]
    numbers, notes = tabulate(found, tasks)
    if left := [task for task in summary.keys(scores) if task not in tasks]:
        notes.append(f"not in the mean accuracy, as not all runs have them: {', '.join(left)}")
    if unfinished := runs.unfinished(folders):
        notes.append(f"not finished: {', '.join(unfinished)}")
    patterns, groups, panels = list(dict.fromkeys(run.pattern for run in found)), [], []
    for (measure, model), part in numbers.groupby(["measure", "model"], sort=False):
        title = f"{model}, {measure}" if numbers.model.nunique() > 1 else measure
        rows = [(label, row.set_index("pattern").cell) for label, row in part.groupby("label", sort=False)]
        better = "lower" if any(name in measure for name in LOWER) else "higher"
        cells = [(label, [row.get(pattern, Cell("-")) for pattern in patterns]) for label, row in rows]
        groups.append((f"{title} ({better} is better)", cells))
        panels.append((title, part))
    print_table(patterns, groups, notes)
    facts = {
        "title": f"{', '.join(numbers.model.unique())}: {len(found)} run{'s' * (len(found) > 1)} compared",
        **{"columns": patterns, "groups": groups, "notes": notes, "mark": summary.MARK},
        "tasks": tasks,
        "protocol": {} if runs.differing_protocol(found) else found[0].results.get("protocol", {}),
        "runs": [str(run.folder) for run in found],
    }
    drawn = {"compare.svg": ("The table as a plot", plots.comparison, panels)}
    if traded := _quality_and_speed(numbers):
        drawn["compare_speed.svg"] = ("Quality against speed: best is low and right", plots.quality_and_speed, traded)
    facts["pictures"] = [(name, caption) for name, (caption, *_) in drawn.items()]
    figures = [(caption, page.data_uri(draw(what))) for caption, draw, what in drawn.values()]
    text = page.render("compare.md.jinja", **facts, figures=figures)
    page.write(out / "compare.html", page.html(text, title=facts["title"], kind="comparison"))
    page.write(out / "compare.md", page.render("compare.md.jinja", **facts, figures=[]))
    for name, (_, draw, what) in drawn.items():
        page.write(out / name, draw(what, background="white"))
    Console().print(Text(f"comparison: {out / 'compare.html'}"), soft_wrap=True)


def tabulate(found: list[Run], tasks: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """A line for each number, in the order of the table, and notes. A dense model has a number for each pattern."""
    notes = [note for run in found for note in summary.notes(run.results)]
    if differing := runs.differing_protocol(found):
        keys = ", ".join(f"evaluate.{key}" for key in differing)
        notes.append(f"the runs differ in {keys}: their numbers are not comparable")
    machines = [speed["machine"] for speed in _speeds(found)]
    if len({(machine["hardware"], machine["threads"], machine["kernels"]) for machine in machines}) > 1:
        notes.append(
            "the decode speeds were measured on different machines, threads or kernels: each is relative to its own"
        )
    lines, seen = [], {}
    for run in found:
        for state in summary.columns(run.results):
            row = runs.row_of(run, state, found)
            about = {"model": row.model, "is_sparse": state != "dense", "method": row.method, "label": row.label}
            is_last = state == summary.columns(run.results)[-1]
            for number in [*_measured(run.results["models"][state], tasks), *(_cost(run, found) if is_last else ())]:
                for pattern in dict.fromkeys(other.pattern for other in found) if state == "dense" else [run.pattern]:
                    first = seen.setdefault((row, number["measure"], pattern), number)
                    if first is number:
                        lines.append({**about, "is_recovered": bool(row.recovery), "pattern": pattern, **number})
                    elif not math.isclose(first["value"], number["value"], rel_tol=1e-4):
                        what = f"{row.model} {row.label}: runs of equal settings differ in {number['measure']}"
                        notes.append(f"{what}; the first is shown")
    if not lines:
        raise UserError("nothing to compare: the runs have no perplexity, and no task that all have")
    order = ["measure", "model", "is_sparse", "method", "is_recovered"]  # each in the order of appearance
    frame = pd.DataFrame(lines).sort_values(
        order, key=lambda column: column if column.dtype == bool else column.factorize()[0], kind="stable"
    )
    cost = frame.value.where(frame.measure.str.contains("|".join(LOWER)), -frame.value)
    rivals = cost.groupby([frame[name] for name in ("measure", "model", "pattern", "is_sparse", "is_recovered")])
    frame["best"] = frame.is_sparse & (cost == rivals.transform("min")) & (rivals.transform("count") > 1)
    frame["cell"] = [Cell(text, best=best) for text, best in zip(frame.text, frame.best)]
    return frame, list(dict.fromkeys(notes))


def _measured(model: dict, tasks: list[str]) -> Iterator[dict]:
    """Measure, value, standard error and text; the mean accuracy is in percent, of independent tasks."""
    for name, value in (model.get("perplexity") or {}).items():
        error = get(model, "perplexity_stderr", name)
        yield dict(measure=f"{name} {PERPLEXITY}", value=value, error=error, text=summary.perplexity(value, error))
    for name, found in (model.get("accuracy") or {}).items():
        value, error, text = found["acc"], found.get("acc_stderr"), summary.accuracy(found, "acc")
        yield dict(measure=f"{name} accuracy, %", value=100 * value, error=error and 100 * error, text=text)
    if tasks:
        scores = [model["zero_shot"][task] for task in tasks]
        mean, error = sum(score["acc"] for score in scores) / len(scores), summary.mean_error(scores)
        text = summary.accuracy({"acc": mean, "acc_stderr": error}, "acc")
        yield dict(measure="mean accuracy, %", value=100 * mean, error=error and 100 * error, text=text)


def _speeds(found: list[Run]) -> list[dict]:
    return [run.speed for run in found if run.speed]


def _cost(run: Run, found: list[Run]) -> Iterator[dict]:
    """The compact folder of a run's last model against the ordinary one; a measure for each setting of export and speed."""
    size, gain = run.sizes and costs.size_ratio(run.sizes), costs.speed_ratio(run.speed)
    for measure, stages, value in ((SIZE, ("export",), size), (SPEED, ("export", "speed"), gain)):
        if value is not None:
            measure += runs.differing_costs(run, found, *stages)
            yield dict(measure=measure, value=value, error=None, text=f"{value:.2f}")


def _quality_and_speed(numbers: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """By model and text, where speeds were measured: a line for each row and pattern, with "perplexity" and "speed"; the dense
    model has speed 1, as the ordinary folder computes the same products."""
    found = []
    speeds = numbers[numbers.measure.str.startswith(SPEED)]
    keys = ["model", "label", "pattern"]
    texts = numbers[numbers.measure.str.contains(PERPLEXITY)].groupby(["measure", "model"], sort=False)
    for ((measure, model), part), (speed, gains) in itertools.product(texts, speeds.groupby("measure", sort=False)):
        rows = part.merge(gains[[*keys, "value"]].rename(columns={"value": "speed"}), "left", keys)
        rows.loc[~rows.is_sparse, "speed"] = 1.0
        rows = rows[rows.speed.notna() & np.isfinite(rows.value)].rename(columns={"value": PERPLEXITY})
        if rows.is_sparse.any():
            title = f"{model}, {measure}" if numbers.model.nunique() > 1 else measure
            found.append((title + speed.removeprefix(SPEED), rows))
    return found
