"""The evaluate stage: perplexity, zero-shot tasks, accuracy and the mask check of the dense model and of all made from it.

Measurements are cached (`evaluation/measure.py`): a killed evaluation resumes, a new task does not re-run the old ones, and
runs in the same parent folder measure their dense model once.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from pipeline import registry
from pipeline.data import images, sources, special_tokens
from pipeline.evaluation import accuracy, continuations, paired
from pipeline.evaluation.measure import Subject, measure
from pipeline.evaluation.tasks import check_tasks
from pipeline.models import loading, processors, verification
from pipeline.reporting import series
from pipeline.runtime import files, memory, processes
from pipeline.runtime.errors import UserError
from pipeline.runtime.versions import versions
from pipeline.settings.schema import STAGES, Recipe
from pipeline.sparsity.masks import Masks

MODELS = {stage.model: stage.name for stage in STAGES.values() if stage.model}  # the stage that writes each
MAX_PROMPT = 128  # tokens; at most half the model's positions


def check(recipe: Recipe) -> None:
    """Raises `UserError` for an unknown task, a missing text or a window longer than the model's positions."""
    if "evaluate" not in recipe.stages:
        return
    check_tasks(recipe.evaluate.tasks, recipe.mirror, recipe.evaluate.fewshot)
    if recipe.model is not None:
        _check_length(loading.locate(recipe.model, recipe.revision), recipe)


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `results.json`: {"models": {"dense", "pruned", ...}, "protocol", "versions", "methods"}, and for images
    `examples.json`: {data set: `accuracy.examples`}.

    Each model has "perplexity" and "perplexity_stderr" by data set, "zero_shot" by task, "accuracy" by data set of images and
    "classes" ([name, right answers, images] of each class), "continuations" of the protocol's "prompts", "differences" from
    each earlier model (`paired.difference`), the "hash" of its folder, "sparsity" and "mask_violations". The protocol holds
    the sha256 of the "masks" file. "methods": see `registry.describe`.
    """
    settings, dense = recipe.evaluate, loading.dense_folder(recipe, inputs)
    _check_length(dense, recipe)
    protocol: dict[str, Any] = {"datasets": {}, "notes": []}
    protocol |= {key: getattr(settings, key) for key in ("seq_len", "limit", "fewshot", "windows", "bos")}
    if recipe.trust_remote_code:
        protocol["notes"].append("trust_remote_code=true: the model's own code was run")
    if quantized := loading.quantization(dense):
        protocol["notes"].append(f"the dense model's files are quantised ({quantized}): its weights were dequantised")
    tokenizer = processors.tokenizer(dense, recipe) if settings.perplexity else None
    if tokenizer and not settings.bos and special_tokens.adds_bos(tokenizer):
        protocol["notes"].append(
            f"the tokenizer begins each text with {tokenizer.bos_token}, so only a text's first window has it, as in the "
            "papers: set evaluate.bos=true for models that need it, such as Gemma"
        )
    protocol["prompts"] = _prompts(recipe, dense)
    subjects = _subjects(dense, inputs, recipe)
    results, samples = {}, {}
    for subject in subjects:
        name = subject.name
        results[name], samples[name] = measure(subject, recipe, protocol)
        memory.free_memory()
        results[name]["differences"] = {
            other: paired.difference(samples[name], samples[other]) for other in samples if other != name
        }
        if subject.adapter:
            protocol["notes"].append(
                f"{name}: a dense LoRA, kept apart because merging it would not leave the weights sparse"
            )
    masks = Masks()
    if "prune" in inputs:
        path = inputs["prune"] / "masks.safetensors"
        masks = Masks.load(path)
        for subject in subjects:
            if not subject.adapter and not subject.is_compact:
                results[subject.name] |= _weights(subject.name, subject.folder, masks, recipe)
    if processes.is_main():
        if masks:
            protocol["masks"] = files.sha256(path)
        content = {"models": results, "protocol": protocol}
        content |= {"versions": versions(), "methods": registry.describe(recipe)}
        files.write_json(folder / "results.json", content)
        if settings.accuracy:
            files.write_json(folder / "examples.json", _examples(dense, recipe, samples))


def _subjects(dense: Path, inputs: dict[str, Path], recipe: Recipe) -> list[Subject]:
    """The models to evaluate. If fine-tuning left no model, its subject is the model before it with the adapter. An exact
    compact folder holds the model before it, bit for bit, so only a rounded one is a subject."""
    subjects = [Subject("dense", dense)]
    for name, stage in MODELS.items():
        if stage == "export" and stage in inputs:
            if recipe.export.values != "exact":
                subjects.append(Subject(name, inputs[stage] / "compact"))
        elif stage in inputs:
            folder, adapter = inputs[stage] / "model", inputs[stage] / "adapter"
            merged = folder.is_dir() or stage != "finetune"
            subjects.append(Subject(name, folder) if merged else Subject(name, subjects[-1].folder, adapter))
    return subjects


def _examples(dense: Path, recipe: Recipe, samples: dict[str, dict]) -> dict[str, list]:
    settings, config = recipe.evaluate, loading.config(dense, recipe)
    found = {}
    for spec, source in zip(settings.accuracy, sources.of_stage(recipe, "evaluate")[len(settings.perplexity) :]):
        shown = images.evaluated(source, None, config, settings.limit)
        answers = {name: of_model["answers"][spec] for name, of_model in samples.items()}
        found[spec] = accuracy.examples(shown, answers, config.id2label)
    return found


def _check_length(folder: Path, recipe: Recipe) -> None:
    if recipe.evaluate.perplexity:
        loading.check_length(loading.config(folder, recipe), "evaluate.seq_len", recipe.evaluate.seq_len)


def _prompts(recipe: Recipe, dense: Path) -> list[str]:
    """The same prompts for all models: the recipe's, or cut from the first perplexity data set by the dense tokenizer."""
    settings = recipe.evaluate
    if settings.continuations == 0 or settings.prompts or not settings.perplexity:
        return settings.prompts if settings.continuations else []
    rows = sources.documents(sources.of_stage(recipe, "evaluate")[0])
    positions = loading.positions(loading.config(dense, recipe))
    longest = min(MAX_PROMPT, positions // 2) if positions else MAX_PROMPT
    return continuations.prompts(rows, processors.tokenizer(dense, recipe), settings.continuations, longest)


def _weights(name: str, folder: Path, masks: Masks, recipe: Recipe) -> dict[str, Any]:
    """Sparsity of the masked matrices, by their zeros. Raises `UserError` if a pruned weight is not zero."""
    matrices = verification.check_matrices(folder, masks, recipe)
    violations = [matrix.violation for matrix in matrices if matrix.violation]
    if violations and name != "dense":
        worst = violations[0]
        raise UserError(
            f"{folder} does not match its masks: {worst.count} pruned weights of {worst.name} are not zero, the first at "
            f"{list(worst.first)} ({len(violations)} such matrices in the {name} model)"
        )
    layers: dict[tuple[str, int, str, int], list[verification.CheckedMatrix]] = defaultdict(list)
    for matrix in matrices:
        stack, number, inner, place = series.LAYER.match(matrix.name).groups()
        layers[stack, int(number), inner or "", int(place or 0)].append(matrix)
    sparsity = {
        "overall": _share(matrices),
        "by_layer": [_share(layers[layer]) for layer in sorted(layers)],
        "by_matrix": {matrix.name: _share([matrix]) for matrix in matrices},
    }
    return {"sparsity": sparsity} | ({} if name == "dense" else {"mask_violations": 0})


def _share(matrices: list[verification.CheckedMatrix]) -> float:
    return sum(matrix.zeros for matrix in matrices) / sum(matrix.weights for matrix in matrices)
