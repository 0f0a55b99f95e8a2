"""The evaluate stage: perplexity, zero-shot tasks and the mask check of the dense, the pruned and the fine-tuned model.

What was measured of a model is kept in `<runs>/.measured/`, by model and settings: a killed evaluation goes on, a new task
does not re-run the old ones, and the dense model is measured once for all runs beside each other.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import data, files, models, processes, sources
from pipeline.errors import UserError
from pipeline.masks import Masks, by_matrix
from pipeline.perplexity import perplexity, windows
from pipeline.recipe import Recipe
from pipeline.tasks import check_tasks, identity
from pipeline.zero_shot import zero_shot

LIBRARIES = ("torch", "transformers", "lm_eval")


def check(recipe: Recipe) -> None:
    """Answers an unknown task or a missing text before any work, as a `UserError`."""
    if "evaluate" not in recipe.stages:
        return
    check_tasks(recipe.evaluate.tasks, recipe.mirror, recipe.evaluate.fewshot)


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `results.json`."""
    folders = {"dense": models.dense_folder(recipe, inputs)}
    folders |= {
        name: inputs[stage] / "model"
        for name, stage in (("pruned", "prune"), ("reconstructed", "reconstruct"), ("finetuned", "finetune"))
        if stage in inputs
    }
    masks = Masks.load(inputs["prune"] / "masks.safetensors")[0] if "prune" in inputs else Masks()
    protocol: dict[str, Any] = {"datasets": {}, "notes": []}
    protocol |= {key: getattr(recipe.evaluate, key) for key in ("seq_len", "limit", "fewshot")}
    results = {name: _measure(name, where, recipe, protocol) for name, where in folders.items()}
    if processes.is_main():
        for name, where in folders.items():
            results[name] |= _weights(name, where, masks)
        libraries = {library: version(library) for library in LIBRARIES}
        files.write_json(folder / "results.json", {"models": results, "protocol": protocol, "versions": libraries})


def _measure(name: str, folder: Path, recipe: Recipe, protocol: dict) -> dict[str, Any]:
    """Perplexity and zero-shot of one model; `protocol` is told what was read."""
    settings = recipe.evaluate
    loaded: list = []  # the model, once something is not measured yet

    def model_and_tokenizer():
        if not loaded:
            loaded.extend([models.load(folder, recipe).to(processes.device()), models.tokenizer(folder, recipe)])
        return loaded

    known_as = processes.from_main(models.identity(folder) if processes.is_main() else None)
    about_model = {"model": known_as, "dtype": recipe.dtype, "attn_implementation": recipe.attn_implementation}
    cache = Path(recipe.run_dir).parent / ".measured"
    found: dict[str, Any] = {"perplexity": {}, "zero_shot": {}}

    for spec, source in zip(settings.perplexity, sources.of_stage(recipe, "evaluate"), strict=True):

        def measure_perplexity(source=source) -> dict:
            model, tokenizer = model_and_tokenizer()
            models.check_length(model.config, "evaluate.seq_len", settings.seq_len)
            windows_NT = windows(data.joined(source, tokenizer), settings.seq_len)
            value = perplexity(
                model, windows_NT, settings.batch_size, processes.rank(), processes.world_size(), processes.all_sum
            )
            return {"perplexity": value, "windows": len(windows_NT)}

        about = about_model | {"text": str(source), "data": sources.identity(source), "seq_len": settings.seq_len}
        measured = _once(cache, about, measure_perplexity)
        found["perplexity"][spec] = measured["perplexity"]
        protocol["datasets"][spec] = f"{source}, {measured['windows']} windows of {settings.seq_len} tokens"
        if source.note and source.note not in protocol["notes"]:
            protocol["notes"].append(source.note)
        processes.say(f"  {name}: perplexity on {spec} {measured['perplexity']:.3f}")

    for task in settings.tasks:

        def measure_task(task=task) -> dict:
            model, tokenizer = model_and_tokenizer()
            return zero_shot(
                model,
                tokenizer,
                [task],
                recipe.mirror,
                settings.batch_size,
                settings.limit,
                settings.fewshot,
                processes.rank(),
                processes.world_size(),
            )

        asked = processes.from_main(identity(task, recipe.mirror, settings.fewshot) if processes.is_main() else None)
        about = about_model | {"task": task, "asked": asked, "limit": settings.limit, "fewshot": settings.fewshot}
        measured = _once(cache, about, measure_task)
        found["zero_shot"] |= measured
        for entry, scores in measured.items():
            processes.say(
                f"  {name}: {entry} " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items() if "stderr" not in k)
            )
    accuracies = [scores["acc"] for scores in found["zero_shot"].values() if "acc" in scores]
    if accuracies:
        found["zero_shot_mean"] = sum(accuracies) / len(accuracies)
    return found


def _once(cache: Path, about: dict, measure: Callable[[], dict]) -> dict:
    """What was measured before under the same key, else what `measure` finds now; the same on all ranks."""
    path = cache / f"{files.digest(about)}.json"
    before = processes.from_main(files.read_json(path))
    if before is not None:
        return before["measured"]
    measured = measure()
    if processes.is_main():
        files.write_json(path, {"about": about, "measured": measured})
    return measured


def _weights(name: str, folder: Path, masks: Masks) -> dict[str, Any]:
    """Sparsity of the masked matrices by what is zero, and the check against the masks; `UserError` where one is broken."""
    zeros: dict[str, tuple[int, int]] = {}  # (zeros, weights)

    def count():
        for key, weight in by_matrix(models.tensors(folder)):
            if key in masks:
                zeros[key] = (int((weight == 0).sum()), weight.numel())
            yield key, weight

    if name == "dense":
        for _ in count():
            pass
    elif violations := masks.violations(count()):
        worst = violations[0]
        raise UserError(
            f"{name} model: {worst.count} pruned weights of {worst.name} are not zero, the first at {list(worst.first)} "
            f"({len(violations)} matrices are broken): {folder} does not keep its masks"
        )
    found: dict[str, Any] = {} if name == "dense" or not masks else {"mask_violations": 0}
    if zeros:
        layers: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for key, counts in zeros.items():
            layers[int(re.search(r"\.(\d+)\.", key)[1])].append(counts)
        found["sparsity"] = {
            "overall": _share(list(zeros.values())),
            "by_layer": [_share(layers[layer]) for layer in sorted(layers)],
            "by_matrix": {key: _share([counts]) for key, counts in zeros.items()},
        }
    return found


def _share(counts: list[tuple[int, int]]) -> float:
    return sum(zero for zero, _ in counts) / sum(weights for _, weights in counts)
