"""Owns what the results say: numbers in, rows and sentences of plain text out, for every form of the report."""

import math
from typing import Any

from pipeline.recipe import Recipe

MODELS = ("dense", "pruned", "finetuned")
METHODS = {"wanda": "Wanda", "lora": "LoRA"}
SHARES = ("acc", "exact_match", "zero_shot_mean")  # metrics in 0..1, by their beginnings
Groups = list[tuple[str, list[tuple[str, list[str]]]]]  # (title, rows), a row being (label, a cell per model)


def columns(results: dict) -> list[str]:
    return [name for name in MODELS if name in results["models"]]


def groups(results: dict) -> Groups:
    """All rows of the table, as text; what no model has is left out."""
    models = [results["models"][name] for name in columns(results)]
    fewshot = results.get("protocol", {}).get("fewshot") or 0
    language, tasks, weights = [], [], []
    for dataset in keys(model.get("perplexity") for model in models):
        values = [(model.get("perplexity") or {}).get(dataset) for model in models]
        language.append((dataset, [perplexity(value) for value in values]))
        if len(values) == len(MODELS) and (back := won_back(*values)) is not None:
            language.append((f"{dataset}, won back (log)", ["", "", f"{back:.0%}"]))
    for task in keys(model.get("zero_shot") for model in models):
        scores = [(model.get("zero_shot") or {}).get(task) or {} for model in models]
        for metric in (key for key in keys(scores) if not key.endswith("_stderr")):
            label = task if metric == "acc" else f"{task}, {metric}"
            label += "" if metric.startswith(SHARES) else " (not in %)"
            tasks.append((label, [accuracy(score, metric) for score in scores]))
    if any(model.get("zero_shot_mean") is not None for model in models):
        tasks.append(("mean", [accuracy(model, "zero_shot_mean") for model in models]))
    sparsity = [(model.get("sparsity") or {}).get("overall") for model in models]
    if any(value is not None for value in sparsity):
        weights.append(("sparsity, %", ["-" if value is None else f"{100 * value:.2f}" for value in sparsity]))
    violations = [model.get("mask_violations") for model in models]
    if any(value is not None for value in violations):
        weights.append(("mask violations", ["-" if value is None else str(value) for value in violations]))
    shots = f"{fewshot}-shot" if fewshot else "Zero-shot"
    titles = ("Perplexity (lower is better)", f"{shots}, % (higher is better)", "Weights")
    return [(title, rows) for title, rows in zip(titles, (language, tasks, weights), strict=True) if rows]


def notes(results: dict) -> list[str]:
    """What a reader must know before believing the table."""
    broken = [
        f"{name}: {count} pruned weights are not zero, so the mask was not kept"
        for name in columns(results)
        if (count := results["models"][name].get("mask_violations"))
    ]
    return broken + list(results.get("protocol", {}).get("notes") or [])


def won_back(dense: float | None, pruned: float | None, finetuned: float | None) -> float | None:
    """(ln pruned - ln finetuned) / (ln pruned - ln dense): 1 is all of the lost log-perplexity, below 0 a further loss.

    None where pruning lost nothing, or a perplexity is missing or not finite.
    """
    if any(value is None or not math.isfinite(value) for value in (dense, pruned, finetuned)) or pruned <= dense:
        return None
    return math.log(pruned / finetuned) / math.log(pruned / dense)


def perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.2e}"


def accuracy(scores: dict, metric: str) -> str:
    """`61.2 ± 1.0` in percent; a metric that is not a share of the questions stays in its own unit."""
    value, error = scores.get(metric), scores.get(f"{metric}_stderr")
    if not isinstance(value, int | float):
        return "-"
    if not metric.startswith(SHARES):
        return f"{value:.4g}"
    known = isinstance(error, int | float)
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if known else "")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"


def headline(recipe: Recipe, results: dict) -> str:
    """One sentence: what was pruned, how, to what sparsity, what that cost and what came back."""
    models, sentence = results["models"], model_name(recipe)
    if "pruned" in models:
        overall = (models["pruned"].get("sparsity") or {}).get("overall")
        share = "" if overall is None else f" ({overall:.2%} of the prunable weights are zero)"
        method = METHODS.get(recipe.prune.method, recipe.prune.method)
        sentence += f", pruned with {method} to {recipe.prune.sparsity}{share},"
    dataset = next(iter(keys(model.get("perplexity") for model in models.values())), None)
    if dataset:
        kind, write = f"{dataset} perplexity", perplexity
        scores = [(models.get(name, {}).get("perplexity") or {}).get(dataset) for name in MODELS]
    else:
        kind, write = "mean zero-shot accuracy in %", lambda value: f"{100 * value:.1f}"
        scores = [models.get(name, {}).get("zero_shot_mean") for name in MODELS]
    said = [write(value) for value in scores if value is not None]
    if not said:
        return f"{sentence} was evaluated."
    if len(said) == 1 or None in scores[:2]:
        return f"{sentence} has a {kind} of {' and '.join(said)}."
    sentence += f" went from a {kind} of {said[0]} to {said[1]}"
    if len(said) == 3:
        method = METHODS.get(recipe.finetune.method, recipe.finetune.method)
        sentence += f"; {method} fine-tuning for {recipe.finetune.max_steps} steps brought it to {said[2]}"
        if dataset and (back := won_back(*scores)) is not None:
            sentence += f" and won back {back:.0%} of the lost log-perplexity" if back > 0 else " and won nothing back"
    return f"{sentence}."


def model_name(recipe: Recipe) -> str:
    shape = recipe.pretrain
    return recipe.model or f"A small Llama trained here ({shape.layers} layers, {shape.hidden_size} wide)"


def keys(tables: Any) -> list[str]:
    """The keys of several dicts (or None), once each, in their order."""
    return list(dict.fromkeys(key for table in tables for key in table or {}))


def points(rows: list[dict[str, float]], x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in rows if x in row and y in row]
