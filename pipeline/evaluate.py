"""The evaluate stage: perplexity, zero-shot tasks and the mask check of the dense, the pruned and the fine-tuned model.

What was measured of a model is kept in `<runs>/.measured/`, by model and settings: a killed evaluation goes on, a new task
does not re-run the old ones, and the dense model is measured once for all runs beside each other.
"""

import functools
import re
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import continuations, data, files, models, paired, placement, processes, sources, verify
from pipeline.decoder import Decoder
from pipeline.errors import UserError
from pipeline.masks import Masks
from pipeline.perplexity import perplexity, streamed, whole, window_losses, windows
from pipeline.recipe import Recipe
from pipeline.tasks import check_tasks, identity
from pipeline.zero_shot import zero_shot

LIBRARIES = ("torch", "transformers", "lm_eval")
MODELS = {"pruned": "prune", "reconstructed": "reconstruct", "finetuned": "finetune"}  # and the stage that makes each
KEPT = 2  # the form of what is kept in .measured; another form is measured anew
EVERY = 30  # seconds between two lines that say how far a long measurement is
PROMPT = 128  # tokens of a prompt at most, and half the model's positions


def check(recipe: Recipe) -> None:
    """Answers an unknown task, a missing text or too long a window before any work, as a `UserError`."""
    if "evaluate" not in recipe.stages:
        return
    check_tasks(recipe.evaluate.tasks, recipe.mirror, recipe.evaluate.fewshot)
    if recipe.model is not None:
        _check_length(models.locate(recipe.model, recipe.revision), recipe)


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `results.json`."""
    settings = recipe.evaluate
    dense = models.dense_folder(recipe, inputs)
    _check_length(dense, recipe)
    folders = {"dense": dense}
    folders |= {name: inputs[stage] / "model" for name, stage in MODELS.items() if stage in inputs}
    protocol: dict[str, Any] = {"datasets": {}, "notes": []}
    protocol |= {key: getattr(settings, key) for key in ("seq_len", "limit", "fewshot")}
    protocol["prompts"] = _prompts(recipe, dense)
    results, samples = {}, {}
    for name, where in folders.items():
        results[name], samples[name] = _measure(name, where, recipe, protocol)
        placement.let_go()
        results[name]["differences"] = {
            other: paired.difference(samples[name], samples[other]) for other in samples if other != name
        }
    if processes.is_main():
        masks = Masks()
        if "prune" in inputs:
            path = inputs["prune"] / "masks.safetensors"
            masks, protocol["masks"] = Masks.load(path)[0], verify.sha256(path)
        for name, where in folders.items():
            results[name] |= _weights(name, where, masks, recipe)
        libraries = {library: version(library) for library in LIBRARIES}
        files.write_json(folder / "results.json", {"models": results, "protocol": protocol, "versions": libraries})


def _measure(name: str, folder: Path, recipe: Recipe, protocol: dict) -> tuple[dict[str, Any], dict[str, dict]]:
    """What is measured of one model, and its single losses and answers as `paired.difference` takes them; `protocol` is
    told what was read."""
    settings = recipe.evaluate
    # each at its first use, since all may have been measured before
    tokenizer = functools.cache(lambda: models.tokenizer(folder, recipe))
    where = functools.cache(lambda: placement.choose(recipe, folder))
    model = functools.cache(lambda: placement.resident(recipe, folder, where()))
    known_as = processes.from_main(models.identity(folder) if processes.is_main() else None)
    about_model = {"model": known_as, "dtype": recipe.dtype, "attn_implementation": recipe.attn_implementation}
    once = functools.partial(_once, Path(recipe.run_dir).parent / ".measured")
    found: dict[str, Any] = {"hash": known_as, "perplexity": {}, "perplexity_stderr": {}, "zero_shot": {}}
    losses: dict[str, list[float]] = {}
    correct: dict[str, list[float]] = {}

    for spec, source in zip(settings.perplexity, sources.of_stage(recipe, "evaluate"), strict=True):

        def measure_perplexity(spec=spec, source=source) -> list[float]:
            tell = _at_times(f"  {name}: perplexity on {spec}, ")
            windows_NT = windows(data.joined(source, tokenizer()), settings.seq_len)
            if where() == "stream":
                decoder = Decoder(models.load(folder, recipe))
                logits, config = streamed(decoder, processes.device(), tell), decoder.model.config
                at_once = placement.BATCH if settings.batch_size == "auto" else settings.batch_size
            else:
                logits, config = whole(model()), model().config
                share = -(-len(windows_NT) // processes.world_size())
                at_once = placement.windows_at_once(settings.batch_size, logits, windows_NT[0], share)
            models.check_vocabulary(config, windows_NT, source)
            return window_losses(
                logits, windows_NT, at_once, processes.rank(), processes.world_size(), _all_sum, tell
            ).tolist()

        about = about_model | {"text": str(source), "data": sources.identity(source), "seq_len": settings.seq_len}
        losses[spec] = once(about, measure_perplexity)
        found["perplexity"][spec] = value = perplexity(torch.tensor(losses[spec], dtype=torch.float64))
        if (error := paired.standard_error(losses[spec])) is not None:
            found["perplexity_stderr"][spec] = value * error  # the error of exp(x) is exp(x) times that of x
        protocol["datasets"][spec] = f"{source}, {len(losses[spec])} windows of {settings.seq_len} tokens"
        if source.note and source.note not in protocol["notes"]:
            protocol["notes"].append(source.note)
        processes.say(f"  {name}: perplexity on {spec} {value:.3f}")

    for task in settings.tasks:

        def measure_task(task=task) -> list[dict]:
            on_cpu = processes.device().type == "cpu"
            return list(
                zero_shot(
                    model(),
                    tokenizer(),
                    [task],
                    recipe.mirror,
                    placement.BATCH if settings.batch_size == "auto" and on_cpu else settings.batch_size,
                    settings.limit,
                    settings.fewshot,
                    processes.rank(),
                    processes.world_size(),
                    _at_times(f"  {name}: {task}, "),
                )
            )

        asked = processes.from_main(identity(task, recipe.mirror, settings.fewshot) if processes.is_main() else None)
        about = about_model | {"task": task, "asked": asked, "limit": settings.limit, "fewshot": settings.fewshot}
        scores, answers = once(about, measure_task)
        found["zero_shot"] |= scores
        correct |= answers
        for entry, numbers in scores.items():
            shown = ", ".join(f"{key} {value:.3f}" for key, value in numbers.items() if "stderr" not in key)
            processes.say(f"  {name}: {entry} {shown}")
    accuracies = [scores["acc"] for scores in found["zero_shot"].values() if "acc" in scores]
    if accuracies:
        found["zero_shot_mean"] = sum(accuracies) / len(accuracies)

    def measure_continuations() -> list[str] | None:
        if processes.is_main():
            return continuations.continuations(model(), tokenizer(), protocol["prompts"], settings.continuation_tokens)

    if protocol["prompts"]:
        about = about_model | {"prompts": protocol["prompts"], "tokens": settings.continuation_tokens}
        found["continuations"] = processes.from_main(once(about, measure_continuations))
    return found, {"losses": losses, "correct": correct}


def _once(cache: Path, about: dict, measure: Callable[[], Any]) -> Any:
    """What was measured before under the same key, else what `measure` finds now; the same on all ranks."""
    about = about | {"kept": KEPT}
    path = cache / f"{files.digest(about)}.json"
    before = processes.from_main(files.read_json(path))
    if before is not None:
        return before["measured"]
    try:
        measured = measure()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is too small: type evaluate.batch_size=1 or evaluate.batch_size=auto, or "
            f"evaluate.placement=stream ({str(error).splitlines()[0]})"
        ) from error
    if processes.is_main():
        files.write_json(path, {"about": about, "measured": measured})
    return measured


def _check_length(folder: Path, recipe: Recipe) -> None:
    models.check_length(models.config(folder, recipe), "evaluate.seq_len", recipe.evaluate.seq_len)


def _prompts(recipe: Recipe, dense: Path) -> list[str]:
    """The same for all models: the recipe's, or from the first perplexity data set, told by the dense model's tokenizer."""
    settings = recipe.evaluate
    if settings.continuations == 0 or settings.prompts or not settings.perplexity:
        return settings.prompts if settings.continuations else []
    rows = sources.documents(sources.of_stage(recipe, "evaluate")[0])
    positions = getattr(models.config(dense, recipe).get_text_config(), "max_position_embeddings", None)
    room = min(PROMPT, positions // 2) if positions else PROMPT
    return continuations.prompts(rows, models.tokenizer(dense, recipe), settings.continuations, room)


def _at_times(beginning: str) -> Callable[[str], None]:
    """Says how far it is, on rank 0, at most once in `EVERY` seconds; a terminal shows lm-eval's own bars instead."""
    last = time.monotonic()

    def tell(text: str) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            processes.say(beginning + text)

    return tell


def _all_sum(loss_N: Tensor) -> Tensor:
    return processes.all_sum(loss_N.to(processes.device())).cpu()


def _weights(name: str, folder: Path, masks: Masks, recipe: Recipe) -> dict[str, Any]:
    """Sparsity of the masked matrices by what is zero, and the check against the masks; `UserError` where one is broken."""
    if not masks:
        return {}
    matrices = list(verify.checked(folder, masks, recipe))
    violations = [matrix.violation for matrix in matrices if matrix.violation]
    if violations and name != "dense":
        worst = violations[0]
        raise UserError(
            f"{name} model: {worst.count} pruned weights of {worst.name} are not zero, the first at {list(worst.first)} "
            f"({len(violations)} matrices are broken): {folder} does not keep its masks"
        )
    layers: dict[int, list[verify.Checked]] = defaultdict(list)
    for matrix in matrices:
        layers[int(re.search(r"\.(\d+)\.", matrix.name)[1])].append(matrix)
    sparsity = {
        "overall": _share(matrices),
        "by_layer": [_share(layers[layer]) for layer in sorted(layers)],
        "by_matrix": {matrix.name: _share([matrix]) for matrix in matrices},
    }
    return {"sparsity": sparsity} | ({} if name == "dense" else {"mask_violations": 0})


def _share(matrices: list[verify.Checked]) -> float:
    return sum(matrix.zeros for matrix in matrices) / sum(matrix.weights for matrix in matrices)
