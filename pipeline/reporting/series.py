"""The numbers that stages log, as tables to draw."""

import csv
import re
from pathlib import Path

import numpy as np
import pandas as pd

Rows = list[dict[str, str]]
# the layer in a parameter's name: model.layers.3.mlp.up_proj.weight, or in a stage, encoder.stages.1.layers.0.fc1.weight
LAYER = re.compile(r"^(.*?)\.(\d+)\.(?:(\w+)\.(\d+)\.)?")


def read(path: Path) -> Rows:
    """A CSV's rows by header, as text; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(rows: Rows, *columns: str) -> pd.DataFrame:
    """Those of the columns that the rows have; NaN for a value that is missing, text or not finite."""
    frame = pd.DataFrame(rows)
    frame = frame[[name for name in columns if name in frame]]
    return frame.apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)


def points(rows: Rows, x: str, y: str) -> pd.Series:
    """`y` by `x`, where both are known."""
    frame = numbers(rows, x, y).dropna()
    return frame.set_index(x)[y] if y in frame and x in frame else pd.Series(dtype=float)


def steps(metrics: Rows, planned: int) -> str:
    """The steps of a training, `300`, or `120 of at most 300` if its validation stopped it."""
    last = metrics[-1].get("step") if metrics else None
    return f"{last} of at most {planned}" if last and last != str(planned) else str(planned)


def by_type(rows: Rows, y: str) -> pd.DataFrame:
    """`y` by layer, a column for each type of matrix, such as q_proj; the mean over the experts of a layer."""
    if y not in (frame := numbers(rows, "layer", y)):
        return frame
    # model.layers.3.mlp.experts.down_proj[5] -> mlp.experts.down_proj -> down_proj, where the end is unique
    kinds = pd.Series([row["matrix"] for row in rows]).str.replace(LAYER, "", regex=True)
    kinds = kinds.str.replace(r"\[\d+\]$|\.weight$", "", regex=True)
    ends = kinds.str.rpartition(".")[2]
    frame["type"] = ends.where(kinds.groupby(ends).transform("nunique") == 1, kinds)
    return frame.pivot_table(y, "layer", "type", "mean", sort=False).sort_index()


def merge_equal(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns that are equal to three decimals become one, with all their names."""
    groups = [
        list(names) for names in frame.round(3).T.groupby(list(frame.index), sort=False, dropna=False).groups.values()
    ]
    whole = len(groups) == 1 < frame.shape[1]
    return pd.DataFrame(
        {f"all {len(names)} matrices" if whole else ", ".join(names): frame[names[0]] for names in groups}
    )
