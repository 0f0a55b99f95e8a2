"""What the results say: numbers in, table rows and sentences of plain text out, for every form of the report."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from pipeline import registry
from pipeline.settings.schema import STAGES, Recipe, Stage

MODEL_STAGES = {stage.model: stage for stage in STAGES.values() if stage.model}  # the stage that writes each model
MODELS = ("dense", *MODEL_STAGES)
METRICS = {"acc_top5": "top 5"}  # as reports call them
SHARES = ("acc", "exact_match", "zero_shot_mean")  # metrics in 0..1, by their beginnings
MARK = "*"


class Cell(NamedTuple):
    value: str
    difference: str = ""  # to the dense model
    significant: bool = False  # the difference is more than two of its standard errors
    best: bool = False


Groups = list[tuple[str, list[tuple[str, list[Cell]]]]]  # (title, rows), a row being (label, a cell per column)
EXPLAINED = (
    "±: standard error. In brackets: the difference to the dense model (perplexity: in percent, or as a factor from "
    f"2 on; accuracy: in points) and its paired standard error; {MARK}: more than two standard errors. "
    "Recovered: the regained share of the log-perplexity, or of the accuracy, that pruning lost."
)


def columns(results: dict) -> list[str]:
    return [name for name in MODELS if name in results["models"]]


def groups(results: dict, published: dict[str, float] | None = None) -> Groups:
    """All rows of the table; what no model has is left out. `published`: perplexities on wikitext2, by model."""
    models, published = {name: results["models"][name] for name in columns(results)}, published or {}
    language, weights = [], []
    for dataset in keys(model.get("perplexity") for model in models.values()):
        language += _row(dataset + part(results), [perplexity_cell(model, dataset) for model in models.values()])
        if dataset == "wikitext2":
            language += _row(f"{dataset}, published", [_cell(published.get(model), perplexity) for model in models], "")
        shares = [recovered_of(models, name, "perplexity", dataset) for name in models]
        language += _row(f"{dataset}, recovered", [_cell(share, "{:.0%}".format) for share in shares], "")
    tasks = _accuracies(models, "zero_shot")
    tasks += _row("mean", [_mean_cell(model) for model in models.values()])
    sparsity = [get(model, "sparsity", "overall") for model in models.values()]
    weights += _row("sparsity, %", [_cell(share, lambda share: f"{100 * share:.2f}") for share in sparsity])
    weights += _row("mask violations", [_cell(model.get("mask_violations"), str) for model in models.values()])
    fewshot = get(results, "protocol", "fewshot")
    shots = f"{fewshot}-shot" if fewshot else "Zero-shot"
    titled = {
        "Perplexity (lower is better)": language,
        f"{shots}, % (higher is better)": tasks,
        "Accuracy, % (higher is better)": _accuracies(models, "accuracy"),
        "Weights": weights,
    }
    return [(title, rows) for title, rows in titled.items() if rows]


def _accuracies(models: dict[str, dict], kind: str) -> list[tuple[str, list[Cell]]]:
    """The rows of the tasks, or of the data sets of images, in a section of the results."""
    rows = []
    for task in keys(model.get(kind) for model in models.values()):
        for metric in keys(get(model, kind, task) for model in models.values()):
            if not metric.endswith("_stderr"):
                label = task if metric == "acc" else f"{task}, {METRICS.get(metric, metric)}"
                label += "" if metric.startswith(SHARES) else " (not in %)"
                rows += _row(label, [_score_cell(model, kind, task, metric) for model in models.values()])
        if kind == "accuracy":
            shares = [recovered_of(models, name, kind, task) for name in models]
            rows += _row(f"{task}, recovered", [_cell(share, "{:.0%}".format) for share in shares], "")
    return rows


def _row(label: str, cells: list[Cell | None], missing: str = "-") -> list[tuple[str, list[Cell]]]:
    """No row where no model has a cell."""
    return [(label, [cell or Cell(missing) for cell in cells])] if any(cells) else []


def _cell(value: Any, form: Callable[[Any], str]) -> Cell | None:
    return None if value is None else Cell(_signed(form(value)))


def part(results: dict) -> str:
    """Marks perplexities of the beginning of a text only."""
    windows = get(results, "protocol", "windows")
    return f" (first {windows} windows)" if windows else ""


def perplexity_cell(model: dict, dataset: str) -> Cell | None:
    """`7.26 ± 0.05`, and as difference `+27.8 ± 0.4%`, or `×2.03 ± 0.02` where it doubled."""
    value, difference = get(model, "perplexity", dataset), get(model, "differences", "dense", "perplexity", dataset)
    if value is None:
        return None
    text = perplexity(value, get(model, "perplexity_stderr", dataset))
    if not difference:
        return Cell(text)
    factor, error = math.exp(min(difference["log"], 700)), difference["stderr"]  # beyond, a float overflows
    change = f"{100 * (factor - 1):+.1f} ± {100 * factor * error:.1f}%"
    if factor >= 2:
        change = f"×{factor:.3g} ± {factor * error:.1g}"
    return Cell(text, _signed(change), abs(difference["log"]) > 2 * error)


def _score_cell(model: dict, kind: str, task: str, metric: str) -> Cell:
    """`61.2 ± 1.0`, and as difference `−2.1 ± 0.8`."""
    text, difference = (
        accuracy(get(model, kind, task) or {}, metric),
        get(model, "differences", "dense", kind, task),
    )
    if metric not in (difference or {}):
        return Cell(text)
    change, error = difference[metric], difference["stderr"]
    return Cell(text, _signed(f"{100 * change:+.1f} ± {100 * error:.1f}"), abs(change) > 2 * error)


def _mean_cell(model: dict) -> Cell | None:
    if model.get("zero_shot_mean") is None:
        return None
    scores = [score for score in (model.get("zero_shot") or {}).values() if "acc" in score]
    return Cell(accuracy({"acc": model["zero_shot_mean"], "acc_stderr": mean_error(scores)}, "acc"))


def mean_error(scores: list[dict]) -> float | None:
    """The standard error of the mean accuracy of independent tasks; None where one is unknown."""
    errors = [score.get("acc_stderr") for score in scores]
    known = errors and all(isinstance(error, int | float) for error in errors)
    return math.hypot(*errors) / len(errors) if known else None


def notes(results: dict) -> list[str]:
    """What a reader must know before believing the table."""
    counts = {name: results["models"][name].get("mask_violations") for name in columns(results)}
    broken = [
        f"{name}: {count} pruned weights are not zero, so the mask was not kept"
        for name, count in counts.items()
        if count
    ]
    return broken + list(get(results, "protocol", "notes") or [])


def recovered(dense: float | None, pruned: float | None, after: float | None) -> float | None:
    """(ln pruned - ln after) / (ln pruned - ln dense): 1 is all of the lost log-perplexity, below 0 a further loss.

    None where pruning lost nothing, or a perplexity is missing or not finite.
    """
    if any(value is None or not math.isfinite(value) for value in (dense, pruned, after)) or pruned <= dense:
        return None
    return math.log(pruned / after) / math.log(pruned / dense)


def recovered_of(models: dict, name: str, kind: str, dataset: str | None) -> float | None:
    """The regained share of what pruning lost on a data set: of the log-perplexity, or of the accuracy."""
    path = (kind, dataset, "acc") if kind == "accuracy" else (kind, dataset)
    numbers = [get(models, model, *path) for model in (*MODELS[:2], name)]
    if name in MODELS[:2]:
        return None
    if kind == "perplexity":
        return recovered(*numbers)
    dense, pruned, after = numbers
    return None if None in numbers or pruned >= dense else (after - pruned) / (dense - pruned)


def perplexity(value: float, error: float | None = None) -> str:
    """`7.26 ± 0.05`; both with the same decimals."""
    form = ".2f" if value < 1000 else ",.0f" if value < 1e7 else ".2e"
    return f"{value:{form}}" + (f" ± {error:{form}}" if error is not None and math.isfinite(value) else "")


def accuracy(scores: dict, metric: str) -> str:
    """`61.2 ± 1.0` in percent; a metric that is not a share of the questions stays in its own unit."""
    value, error = scores.get(metric), scores.get(f"{metric}_stderr")
    if not isinstance(value, int | float):
        return "-"
    if not metric.startswith(SHARES):
        return f"{value:.4g}"
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if isinstance(error, int | float) else "")


def _signed(text: str) -> str:
    return re.sub(r"^-", "−", text)  # as wide as a plus


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"


def stage_label(stage: Stage, label: Callable[[str], str]) -> str:
    """What reports call a stage that recovers a model; `label` gives the label of a setting that a registry lists."""
    key = f"{stage.name}.method"
    return label(key) if key in registry.REGISTRIES else stage.label or stage.name


def model_name(recipe: Recipe) -> str:
    shape = recipe.pretrain
    kind = "Llama" if shape.dataset == "world" else "ViT"
    return recipe.model or f"A small {kind} trained here ({shape.layers} layers, {shape.hidden_size} wide)"


def short(model: str) -> str:
    """The last part of a folder's path, a hub id whole."""
    return model.rstrip("/").rpartition("/")[2] if model.startswith((".", "/", "~")) else model


def label_of(recipe: Recipe, key: str, results: dict) -> str:
    return registry.label(key, registry.value_of(recipe, key), results.get("methods"))


def pruned_with(recipe: Recipe, results: dict) -> str:
    settings = {key: registry.value_of(recipe, key) for key in (*registry.PRUNING, registry.TARGET)}
    return registry.pruned_with(settings, results.get("methods"))


def keys(tables: Iterable[Any]) -> list[str]:
    """The keys of several dicts (or None), once each, in their order."""
    return list(dict.fromkeys(key for table in tables for key in table or {}))


def get(tree: Any, *path: str) -> Any:
    """A value of nested dicts, each of which may be None or missing; None where there is none."""
    for key in path:
        tree = (tree or {}).get(key)
    return tree
