"""Prunes a real model of 135M parameters with many methods, recovers it, and makes the tables and the plot of RESULTS.md.

    python benchmarks/real.py --model ./smollm2 --mirror ./hub --work ./work              # hours on two cores
    python benchmarks/real.py ... --part methods --only wanda_2of4 wanda_0.5 --samples 32
    python benchmarks/real.py ... --only none                                             # only the tables of finished rows
    OMP_NUM_THREADS=1 python benchmarks/real.py ... --jobs 12                             # minutes on a large GPU
    python benchmarks/real.py ... --part combinations --seconds                           # the time of each prune stage

Each row is one command with the run folder `<work>/<row>`, printed before it runs. The same benchmark command resumes. A row
that continues another row links that row's finished stages into its folder.

The mirror holds WikiText-2: the tokenised validation split for calibration and training, and the raw test split, whose first 32
windows of 1,024 tokens are evaluated. CPU minutes are summed over all threads and halved, which is the time on two idle cores.
With `--jobs`, rows run at the same time and slow each other down: their times are no measurement. `--seconds` runs nothing but
the prune stage of each row, one after the other in this process, after one that warms up.
"""

import argparse
import csv
import json
import math
import os
import re
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pyarrow.parquet as parquet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.real_plot import plot
from benchmarks.real_rows import PARTS, Row, rows
from benchmarks.real_run import command, run_all

TASKS = ("arc_easy", "arc_challenge", "openbookqa")


def write_text(mirror: Path, path: Path) -> None:
    """Writes WikiText-2's validation split with one article per row; the original rows are paragraphs, half of them empty.
    Removes <unk>, which is 13% of the tokens here and does not occur in the raw test split."""
    folder = mirror / "Salesforce" / "wikitext" / "wikitext-2-v1"
    lines = [
        line
        for file in sorted(folder.glob("validation-*.parquet"))
        for line in parquet.read_table(file)["text"].to_pylist()
    ]
    text = re.sub(r" ?<unk>", "", "\n\n".join(lines))
    articles = [part for part in re.split(r"(?m)^(?= = [^=].* = $)", text) if part.strip()]
    path.write_text("".join(json.dumps({"text": article}) + "\n" for article in articles))


def without_repeats(chosen: list[Row]) -> list[Row]:
    """Some rows are in two tables."""
    return list({row.name: row for row in reversed(chosen)}.values())[::-1]


def print_seconds(chosen: list[Row], args: argparse.Namespace) -> None:
    """Runs and times the prune stage of each row; its files are removed."""
    from pipeline.settings import reader
    from pipeline.stages import runner

    print("| method | pattern | seconds | GiB |\n| --- | --- | --- | --- |")
    for number, row in enumerate((chosen[0], *chosen)):
        run_dir = args.work / "seconds" / row.name
        shutil.rmtree(run_dir, ignore_errors=True)
        settings = [setting for setting in command(row, args)[1:] if not setting.startswith(("stages=", "run_dir="))]
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
            runner.run(reader.load([*settings, "stages=[prune]", f"run_dir={run_dir}"]))
        stage = json.loads((run_dir / "prune" / "stage.json").read_text())
        shutil.rmtree(run_dir)
        if number:
            print(f"| {row.method} | {row.pattern} | {stage['seconds']:.1f} | {stage['memory_gib']:.1f} |", flush=True)


def results(row: Row, args: argparse.Namespace) -> dict | None:
    path = args.work / row.name / "evaluate" / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def minutes(row: Row, args: argparse.Namespace, stages: str) -> str:
    return " + ".join(f"{spent / 120:.1f}" for spent in seconds(row, args, stages))


def seconds(row: Row, args: argparse.Namespace, stages: str) -> list[float]:
    """The CPU seconds of each stage, of all threads."""
    folders = [args.work / row.name / stage for stage in stages.split(",") if stage]
    return [json.loads((folder / "stage.json").read_text())["cpu_seconds"] for folder in folders]


def layer_error(row: Row, args: argparse.Namespace) -> str:
    """The mean over layers of their matrices' relative output error after pruning."""
    with open(args.work / row.name / "prune" / "layers.csv", newline="") as file:
        errors = [float(layer["relative_output_error"]) for layer in csv.DictReader(file)]
    return f"{sum(errors) / len(errors):.3f}"


def cells(model: dict, dense: dict, pruned: dict) -> list[str]:
    """Perplexity, the recovered share of the lost log-perplexity, and the task accuracies."""
    value, error = model["perplexity"]["wikitext2"], model["perplexity_stderr"]["wikitext2"]
    before, after, best = (math.log(of_model["perplexity"]["wikitext2"]) for of_model in (pruned, model, dense))
    share = "" if model in (dense, pruned) else f"{(before - after) / (before - best):.0%}"
    scores = [model["zero_shot"].get(task) for task in TASKS]
    accuracies = [f"{100 * score['acc']:.1f} ± {100 * score['acc_stderr']:.1f}" if score else "" for score in scores]
    return [f"{value:.1f} ± {error:.1f}", share, *accuracies]


def table(part: str, args: argparse.Namespace) -> None:
    finished = [(row, content["models"]) for row in rows() if row.part == part and (content := results(row, args))]
    if not finished:
        return
    columns = ("", "pattern", "perplexity", "recovered", *TASKS, "output error", "CPU minutes / 2", "GiB", "violations")
    print(f"\n{part}\n\n| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    dense = next((models["dense"] for _, models in finished if models["dense"]["zero_shot"]), finished[0][1]["dense"])
    print("|", " | ".join(["dense", "", *cells(dense, dense, dense), "", "", "", ""]), "|")
    for row, models in finished:
        last = models[list(models)[-1]]
        quality = cells(last, models["dense"], models["pruned"])
        error = "" if part == "recovery" else layer_error(row, args)
        spent = minutes(row, args, row.stages.removeprefix("prune,") if part == "recovery" else row.stages)
        memory = json.loads((args.work / row.name / row.stages.split(",")[-1] / "stage.json").read_text())["memory_gib"]
        ending = (error, spent, f"{memory:.1f}", str(last["mask_violations"]))
        print("|", " | ".join([row.method, row.pattern, *quality, *ending]), "|")


def grid(args: argparse.Namespace) -> None:
    """The finished combinations side by side. In each cell: perplexity, accuracies, output error."""
    cells_of: dict[str, dict[str, str]] = {}  # by combination and pattern
    for row in rows():
        if row.part == "combinations" and (content := results(row, args)):
            pruned = content["models"]["pruned"]
            accuracies = [f"{100 * score['acc']:.1f}" for score in pruned["zero_shot"].values()]
            cell = (f"{pruned['perplexity']['wikitext2']:.1f}", *accuracies, layer_error(row, args))
            cells_of.setdefault(row.method, {})[row.pattern] = " / ".join(cell)
    patterns = list(dict.fromkeys(pattern for of_method in cells_of.values() for pattern in of_method))
    if not patterns:
        return
    print(f"\n|  | {' | '.join(patterns)} |\n{'| --- ' * (1 + len(patterns))}|")
    for method, of_method in cells_of.items():
        print("|", " | ".join((method, *(of_method.get(pattern, "") for pattern in patterns))), "|")


def plot_quality(args: argparse.Namespace) -> None:
    """WORK/quality.png, if there are finished rows: perplexity against the minutes of all stages before the evaluation."""
    points, dense = {}, None
    for row in without_repeats(rows()):
        if content := results(row, args):
            *_, last = content["models"].values()
            dense = content["models"]["dense"]["perplexity"]["wikitext2"]
            spent = sum(seconds(row, args, row.stages)) / 120
            start = " from wanda" if row.part == "recovery" and " from " not in row.method else ""
            points.setdefault(row.pattern, []).append((row.method + start, spent, last["perplexity"]["wikitext2"]))
    plot(points, dense, args.work / "quality.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--mirror", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--only", nargs="+", help="names of rows, such as wanda_2of4")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples of 1,024 tokens")
    parser.add_argument(
        "--jobs", type=int, default=1, help="rows at a time; more than 1: output goes to <work>/<row>/output.txt"
    )
    parser.add_argument("--seconds", action="store_true", help="only time the prune stages")
    parser.add_argument("--limit", type=int, default=0, help="questions per task; 0: no tasks")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--batch-size", type=int, default=4, help="windows or questions at a time, in evaluations")
    args = parser.parse_args()
    args.model, args.mirror, args.work = (path.resolve() for path in (args.model, args.mirror, args.work))
    args.work.mkdir(parents=True, exist_ok=True)
    write_text(args.mirror, args.work / "validation.jsonl")
    chosen = [row for row in rows() if row.part in args.part and (args.only is None or row.name in args.only)]
    chosen = without_repeats(chosen)
    if missing := set(args.only or ()) - {row.name for row in chosen} - {"none"}:
        parser.error(f"there is no row {min(missing)} in --part {' '.join(args.part)}")
    if args.seconds:
        print_seconds(chosen, args)
        return 0
    failed = run_all(chosen, args)
    for part in args.part:
        table(part, args)
    if "combinations" in args.part:
        grid(args)
    plot_quality(args)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
