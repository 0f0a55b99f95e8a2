"""Owns what the results say: numbers in, rows and sentences of plain text out, for every form of the report."""

import math
import re
from typing import Any, NamedTuple

from pipeline import registry
from pipeline.settings.schema import STAGES, Recipe

MODELS = ("dense", *(stage.model for stage in STAGES.values() if stage.model))  # in the order of the work
SHARES = ("acc", "exact_match", "zero_shot_mean")  # metrics in 0..1, by their beginnings
MARK = "*"


class Cell(NamedTuple):
    """A number as text, and below it what separates it from the dense model's."""

    value: str
    difference: str = ""
    beyond: bool = False  # that difference lies beyond two of its standard errors
    strong: bool = False

    @property
    def marked(self) -> str:
        return self.value + MARK * self.beyond


Groups = list[tuple[str, list[tuple[str, list[Cell]]]]]  # (title, rows), a row being (label, a cell per column)
NOTHING = Cell("-")
WON_BACK = "won back"


def columns(results: dict) -> list[str]:
    return [name for name in MODELS if name in results["models"]]


def groups(results: dict, published: dict[str, float] | None = None) -> Groups:
    """All rows of the table, as text; what no model has is left out. `published`: perplexities on wikitext2, by model."""
    names = columns(results)
    models = [results["models"][name] for name in names]
    fewshot = results.get("protocol", {}).get("fewshot") or 0
    language, tasks, weights = [], [], []
    for dataset in keys(model.get("perplexity") for model in models):
        language.append((f"{dataset}{_part(results)}", [perplexity_cell(model, dataset) for model in models]))
        if dataset == "wikitext2" and published:
            told = [published.get(name) for name in names]
            language.append((f"{dataset}, published", [Cell("" if it is None else perplexity(it)) for it in told]))
        if any(back := [_won_back_cell(results["models"], name, dataset) for name in names]):
            language.append((f"{dataset}, {WON_BACK}", [cell or Cell("") for cell in back]))
    for task in keys(model.get("zero_shot") for model in models):
        scores = [(model.get("zero_shot") or {}).get(task) or {} for model in models]
        for metric in (key for key in keys(scores) if not key.endswith("_stderr")):
            label = task if metric == "acc" else f"{task}, {metric}"
            label += "" if metric.startswith(SHARES) else " (not in %)"
            tasks.append((label, [_score_cell(model, task, metric) for model in models]))
    if any(model.get("zero_shot_mean") is not None for model in models):
        tasks.append(("mean", [Cell(accuracy(_mean(model), "acc")) for model in models]))
    sparsity = [(model.get("sparsity") or {}).get("overall") for model in models]
    if any(value is not None for value in sparsity):
        weights.append(("sparsity, %", [NOTHING if it is None else Cell(f"{100 * it:.2f}") for it in sparsity]))
    violations = [model.get("mask_violations") for model in models]
    if any(value is not None for value in violations):
        weights.append(("mask violations", [NOTHING if it is None else Cell(str(it)) for it in violations]))
    shots = f"{fewshot}-shot" if fewshot else "Zero-shot"
    titles = ("Perplexity (lower is better)", f"{shots}, % (higher is better)", "Weights")
    return [(title, rows) for title, rows in zip(titles, (language, tasks, weights), strict=True) if rows]


def _part(results: dict) -> str:
    """Marks perplexities that are of the beginning of a text only."""
    windows = results.get("protocol", {}).get("windows")
    return f" (first {windows} windows)" if windows else ""


def explained(groups: Groups) -> str:
    """What the signs in the table mean; only of those that are there."""
    labels = [label for _, rows in groups for label, _ in rows]
    cells = [cell for _, rows in groups for _, told in rows for cell in told]
    said = []
    if any("±" in cell.value for cell in cells):
        said.append("±: standard error.")
    if any(cell.difference for cell in cells):
        said.append(
            "Small: the difference to the dense model (of perplexities in percent, or the factor from twice on; of "
            f"accuracies in points) and its paired standard error; {MARK} where it is beyond two of these."
        )
    if any(WON_BACK in label for label in labels):
        said.append("Won back: the part of the log-perplexity lost by pruning.")
    return " ".join(said)


def perplexity_cell(model: dict, dataset: str) -> Cell:
    """`7.26 ± 0.05`, and below it `+27.8 ± 0.4 %`, or `×2.03 ± 0.02` where it doubled."""
    value = (model.get("perplexity") or {}).get(dataset)
    if value is None:
        return NOTHING
    text = perplexity(value, (model.get("perplexity_stderr") or {}).get(dataset))
    difference = _difference(model, "perplexity", dataset)
    if "log" not in difference:
        return Cell(text)
    factor, stderr = math.exp(min(difference["log"], 700)), difference["stderr"]  # beyond, a float overflows
    if factor >= 2:
        below = f"×{factor:.3g} ± {factor * stderr:.1g}"
    else:
        below = f"{100 * (factor - 1):+.1f} ± {100 * factor * stderr:.1f}%"
    return Cell(text, _signed(below), is_beyond(difference["log"], stderr))


def _score_cell(model: dict, task: str, metric: str) -> Cell:
    """`61.2 ± 1.0`, and below it `−2.1 ± 0.8`."""
    text = accuracy((model.get("zero_shot") or {}).get(task) or {}, metric)
    difference = _difference(model, "zero_shot", task)
    if metric not in difference:
        return Cell(text)
    change, stderr = difference[metric], difference["stderr"]
    return Cell(text, _signed(f"{100 * change:+.1f} ± {100 * stderr:.1f}"), is_beyond(change, stderr))


def _mean(model: dict) -> dict:
    scores = [score for score in (model.get("zero_shot") or {}).values() if "acc" in score]
    return {"acc": model.get("zero_shot_mean"), "acc_stderr": mean_error(scores)}


def mean_error(scores: list[dict]) -> float | None:
    """The standard error of the mean accuracy of tasks, which are independent of each other; None where one is unknown."""
    errors = [score.get("acc_stderr") for score in scores]
    known = errors and all(isinstance(error, int | float) for error in errors)
    return math.hypot(*errors) / len(errors) if known else None


def _won_back_cell(models: dict, name: str, dataset: str) -> Cell | None:
    if name in MODELS[:2]:
        return None
    told = [(models.get(model) or {}).get("perplexity", {}).get(dataset) for model in ("dense", "pruned", name)]
    back = won_back(*told)
    return None if back is None else Cell(_signed(f"{back:.0%}"))


def _difference(model: dict, kind: str, key: str) -> dict[str, float]:
    return ((model.get("differences") or {}).get("dense") or {}).get(kind, {}).get(key) or {}


def is_beyond(difference: float, stderr: float) -> bool:
    return abs(difference) > 2 * stderr


def notes(results: dict) -> list[str]:
    """What a reader must know before believing the table."""
    broken = [
        f"{name}: {count} pruned weights are not zero, so the mask was not kept"
        for name in columns(results)
        if (count := results["models"][name].get("mask_violations"))
    ]
    return broken + list(results.get("protocol", {}).get("notes") or [])


def won_back(dense: float | None, pruned: float | None, healed: float | None) -> float | None:
    """(ln pruned - ln healed) / (ln pruned - ln dense): 1 is all of the lost log-perplexity, below 0 a further loss.

    None where pruning lost nothing, or a perplexity is missing or not finite.
    """
    if any(value is None or not math.isfinite(value) for value in (dense, pruned, healed)) or pruned <= dense:
        return None
    return math.log(pruned / healed) / math.log(pruned / dense)


def perplexity(value: float, error: float | None = None) -> str:
    """`7.26 ± 0.05`; both with the same decimals."""
    error = error if math.isfinite(value) else None
    form = ".2f" if value < 1000 else ",.0f" if value < 1e7 else ".2e"
    return f"{value:{form}}" + (f" ± {error:{form}}" if error is not None else "")


def accuracy(scores: dict, metric: str) -> str:
    """`61.2 ± 1.0` in percent; a metric that is not a share of the questions stays in its own unit."""
    value, error = scores.get(metric), scores.get(f"{metric}_stderr")
    if not isinstance(value, int | float):
        return "-"
    if not metric.startswith(SHARES):
        return f"{value:.4g}"
    known = isinstance(error, int | float)
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if known else "")


def _signed(text: str) -> str:
    return re.sub(r"^-", "−", text)  # as wide as a plus


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"


def headline(recipe: Recipe, results: dict) -> str:
    """One sentence: what was pruned, how, to what sparsity, what that cost and what came back."""
    models, sentence = results["models"], short(model_name(recipe))
    if "pruned" in models:
        overall = (models["pruned"].get("sparsity") or {}).get("overall")
        share = "" if overall is None else f" ({overall:.2%} of the prunable weights are zero)"
        method, pattern = (label_of(recipe, key, results) for key in ("prune.method", "prune.sparsity"))
        sentence += f", pruned with {method} to {pattern}{share},"
    dataset = next(iter(keys(model.get("perplexity") for model in models.values())), None)
    if dataset:
        kind, write = f"{dataset}{_part(results)} perplexity", perplexity
        scores = {name: (models[name].get("perplexity") or {}).get(dataset) for name in columns(results)}
    else:
        kind, write = "mean zero-shot accuracy in %", lambda value: f"{100 * value:.1f}"
        scores = {name: models[name].get("zero_shot_mean") for name in columns(results)}
    said = {name: value for name, value in scores.items() if value is not None}
    if not said:
        return f"{sentence} was evaluated."
    if not {"dense", "pruned"} <= said.keys():
        return f"{sentence} has a {kind} of {' and '.join(map(write, said.values()))}."
    sentence += f" went from a {kind} of {write(said['dense'])} to {write(said['pruned'])}"
    steps = f"{label_of(recipe, 'finetune.method', results)} for {recipe.finetune.max_steps} steps"
    healers = {"reconstructed": "reconstruction of its layers", "finetuned": steps}
    healed = [name for name in healers if name in said]
    for name in healed:
        sentence += f"{',' if name != healed[0] else ';'} {healers[name]} brought it to {write(said[name])}"
    if healed and dataset and (back := won_back(said["dense"], said["pruned"], said[healed[-1]])) is not None:
        sentence += f" and won back {back:.0%} of the lost log-perplexity" if back > 0 else " and won nothing back"
    return f"{sentence}."


def model_name(recipe: Recipe) -> str:
    shape = recipe.pretrain
    return recipe.model or f"A small Llama trained here ({shape.layers} layers, {shape.hidden_size} wide)"


def short(model: str) -> str:
    """A folder's own name, a hub id whole."""
    return model.rstrip("/").rpartition("/")[2] if model.startswith((".", "/", "~")) else model


def label_of(recipe: Recipe, key: str, results: dict) -> str:
    return registry.label(key, registry.value_of(recipe, key), results.get("methods"))


def keys(tables: Any) -> list[str]:
    """The keys of several dicts (or None), once each, in their order."""
    return list(dict.fromkeys(key for table in tables for key in table or {}))
