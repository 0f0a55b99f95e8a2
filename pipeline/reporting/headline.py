"""The sentence that says what a run did to a model, and what became of it."""

from pipeline.reporting.series import Rows, steps
from pipeline.reporting.summary import (
    MODEL_STAGES,
    columns,
    get,
    keys,
    label_of,
    model_name,
    part,
    perplexity,
    pruned_with,
    recovered_of,
    short,
    stage_label,
)
from pipeline.settings.schema import Recipe


def headline(recipe: Recipe, results: dict, metrics: Rows = ()) -> str:
    """What was pruned, how, to what sparsity, and what became of the first perplexity, or else of the
    accuracy. `metrics`: the log of the fine-tuning."""
    models, sentence = {name: results["models"][name] for name in columns(results)}, short(model_name(recipe))
    if "pruned" in models:
        overall = get(models, "pruned", "sparsity", "overall")
        share = "" if overall is None else f" ({overall:.2%} of the prunable weights are zero)"
        pattern = label_of(recipe, "prune.sparsity", results)
        sentence += f", pruned with {pruned_with(recipe, results)} to {pattern}{share}"
    kind = next(
        (measure for measure in ("perplexity", "accuracy") if any(model.get(measure) for model in models.values())),
        None,
    )
    dataset = next(iter(keys(model.get(kind) for model in models.values())), None)
    measure, form = "mean zero-shot accuracy (%)", lambda value: f"{100 * value:.1f}"
    if kind == "perplexity":
        measure, form = f"{dataset}{part(results)} perplexity", perplexity
        values = {name: get(model, kind, dataset) for name, model in models.items()}
    elif kind == "accuracy":
        measure = f"accuracy on {dataset} (%)"
        values = {name: get(model, kind, dataset, "acc") for name, model in models.items()}
    else:
        values = {name: model.get("zero_shot_mean") for name, model in models.items()}
    values = {name: value for name, value in values.items() if value is not None}
    if not values:
        return f"{sentence} was evaluated."
    parts = [f"{form(value)} {_state(recipe, results, name, metrics)}" for name, value in values.items()]
    sentence += f": {measure} {' → '.join(parts)}."
    share = recovered_of(models, list(values)[-1], kind, dataset) if kind else None
    if share is None:
        return sentence
    lost = "accuracy" if kind == "accuracy" else "log-perplexity"
    return f"{sentence} {f'{share:.0%} of the lost {lost}' if share > 0 else 'Nothing'} was recovered."


def _state(recipe: Recipe, results: dict, model: str, metrics: Rows) -> str:
    """A model in the headline: `pruned`, `after LoRA for 300 steps`."""
    if model in ("dense", "pruned"):
        return model
    stage = MODEL_STAGES[model]
    planned = getattr(getattr(recipe, stage.name, None), "max_steps", None)
    text = f"after {stage_label(stage, lambda key: label_of(recipe, key, results))}"
    return f"{text} for {steps(metrics, planned)} steps" if planned else text
