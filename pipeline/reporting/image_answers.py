"""What the results say about images: accuracy by class, and examples with each model's answer."""

from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.reporting import summary
from pipeline.runtime import files

MAX_CLASSES = 30  # that are shown


def by_class(results: dict) -> dict[str, pd.DataFrame]:
    """{caption: accuracy, a row for each class, a column for each model} of each data set. The classes with the largest drop
    from the dense to the pruned model come first, and the caption says how many are left out."""
    models = {name: results["models"][name].get("classes") or {} for name in summary.columns(results)}
    found = {}
    for dataset in summary.keys(models.values()):
        counts = {name: of_model[dataset] for name, of_model in models.items() if dataset in of_model}
        labels = [name for name, _, _ in next(iter(counts.values()))]
        frame = pd.DataFrame({name: [right / of for _, right, of in rows] for name, rows in counts.items()})
        drop = frame.iloc[:, 0] - frame.iloc[:, min(1, frame.shape[1] - 1)]
        order = drop.sort_values(ascending=False, kind="stable").index[:MAX_CLASSES]
        caption = f"Accuracy by class on {dataset}, largest drop first"
        if left_out := len(labels) - len(order):
            caption += f" ({left_out} of {len(labels)} classes, with smaller drops, are left out)"
        found[caption] = frame.loc[order].set_axis([labels[place] for place in order])
    return found


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """The accuracies of `by_class` in percent, with the class as the first column."""
    return (100 * frame).rename_axis("class, %").reset_index()


def examples(folder: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """(data set, examples) of the evaluate stage's folder, see `pipeline.evaluation.accuracy.examples`. Names are on one
    line."""
    found = files.read_json(folder / "examples.json") or {}
    for shown in found.values():
        for example in shown:
            example["class"] = " ".join(example["class"].split())
            example["answers"] = {model: " ".join(answer.split()) for model, answer in example["answers"].items()}
    return list(found.items())
