"""Owns what is measured of one model, and what of it is kept in `<runs>/.measured/`, by model, settings and the code that
measures."""

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pipeline.data import sources, special_tokens, token_windows
from pipeline.evaluation import continuations, paired
from pipeline.evaluation.perplexity import perplexity, streamed, whole, window_losses, windows
from pipeline.evaluation.tasks import identity
from pipeline.evaluation.zero_shot import zero_shot
from pipeline.models import loading, model_files, placement
from pipeline.runtime import code, files, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe

EVERY = 30  # seconds between two lines that say how far a long measurement is


@dataclass(frozen=True)
class Subject:
    """A model folder, and the adapter that is kept apart from its weights, where there is one."""

    name: str  # dense, pruned, ...
    folder: Path
    adapter: Path | None = None

    def load(self, recipe: Recipe, **where: Any) -> nn.Module:
        model = loading.load(self.folder, recipe, **where)
        return PeftModel.from_pretrained(model, self.adapter).get_base_model().eval() if self.adapter else model

    def identity(self) -> str:
        known_as = model_files.identity(self.folder)
        return files.digest([known_as, files.fingerprint(self.adapter.iterdir())]) if self.adapter else known_as


def measure(subject: Subject, recipe: Recipe, protocol: dict) -> tuple[dict[str, Any], dict[str, dict]]:
    """What is measured of one model, and its single losses and answers as `paired.difference` takes them; `protocol` is
    told what was read."""
    settings, name = recipe.evaluate, subject.name
    # each at its first use, since all may have been measured before
    tokenizer = functools.cache(lambda: loading.tokenizer(subject.folder, recipe))
    where = functools.cache(lambda: placement.choose(settings.placement, lambda: subject.load(recipe)))
    model = functools.cache(lambda: placement.resident(where(), functools.partial(subject.load, recipe)))
    known_as = processes.from_main(subject.identity() if processes.is_main() else None)
    about_model = {"model": known_as, "dtype": recipe.dtype, "attn_implementation": recipe.attn_implementation}
    about_model |= {"code": code.fingerprint(__name__)}
    once = functools.partial(_once, Path(recipe.run_dir).parent / ".measured", "evaluate" in recipe.rerun)
    found: dict[str, Any] = {"hash": known_as, "perplexity": {}, "perplexity_stderr": {}, "zero_shot": {}}
    losses: dict[str, list[float]] = {}
    correct: dict[str, list[float]] = {}

    for spec, source in zip(settings.perplexity, sources.of_stage(recipe, "evaluate"), strict=True):

        def measure_losses(spec=spec, source=source) -> list[float]:
            tell = _at_times(f"  {name}: perplexity on {spec}, ")
            bos = special_tokens.bos(tokenizer()) if settings.bos else None
            ids = token_windows.joined(source, tokenizer(), settings.seq_len)
            windows_NT = windows(ids, settings.seq_len, settings.windows, bos)
            if where() == "stream":
                layerwise = subject.load(recipe)
                loading.check_vocabulary(layerwise.config, windows_NT, source)
                logits = streamed(layerwise, processes.device(), tell)
                at_once = placement.number(settings.batch_size)
            else:
                loading.check_vocabulary(model().config, windows_NT, source)
                logits = whole(model())
                at_once = placement.windows_at_once(settings.batch_size, logits, windows_NT)
            share = (processes.rank(), processes.world_size(), _all_sum)
            return window_losses(logits, windows_NT, at_once, *share, tell).tolist()

        about = about_model | {"text": str(source), "data": sources.identity(source), "seq_len": settings.seq_len}
        about |= {key: value for key in ("column", "windows", "bos") if (value := getattr(settings, key))}
        losses[spec] = once(about, measure_losses)
        found["perplexity"][spec] = value = perplexity(torch.tensor(losses[spec], dtype=torch.float64))
        if (error := paired.standard_error(losses[spec])) is not None:
            found["perplexity_stderr"][spec] = value * error  # the error of exp(x) is exp(x) times that of x
        protocol["datasets"][spec] = (
            f"{source}, {'the first ' if settings.windows else ''}{len(losses[spec])} windows of {settings.seq_len} tokens"
        )
        if source.note and source.note not in protocol["notes"]:
            protocol["notes"].append(source.note)
        processes.say(f"  {name}: perplexity on {spec} {value:.3f}")

    for task in settings.tasks:

        def measure_task(task=task) -> tuple[dict, dict]:
            return zero_shot(
                model(),
                tokenizer(),
                [task],
                recipe.mirror,
                settings.batch_size if processes.device().type == "cuda" else placement.number(settings.batch_size),
                settings.limit,
                settings.fewshot,
                processes.rank(),
                processes.world_size(),
                _at_times(f"  {name}: {task}, "),
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
        where()  # which all ranks settle together
        if processes.is_main():
            return continuations.continuations(model(), tokenizer(), protocol["prompts"], settings.continuation_tokens)

    if protocol["prompts"]:
        about = about_model | {"prompts": protocol["prompts"], "tokens": settings.continuation_tokens}
        found["continuations"] = processes.from_main(once(about, measure_continuations))
    return found, {"losses": losses, "correct": correct}


def _once(cache: Path, again: bool, about: dict, find: Callable[[], Any]) -> Any:
    """What was measured before under the same key, else, or if `again`, what `find` finds now; the same on all ranks."""
    path = cache / f"{files.digest(about)}.json"
    before = None if again else processes.from_main(files.read_json(path))
    if before is not None:
        return before["measured"]
    try:
        measured = find()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is too small: set evaluate.batch_size=1 or evaluate.batch_size=auto, or "
            f"evaluate.placement=stream ({str(error).splitlines()[0]})"
        ) from error
    if processes.is_main():
        files.write_json(path, {"about": about, "measured": measured})
    return measured


def _at_times(beginning: str) -> Callable[[str], None]:
    """Says how far it is, on rank 0, at most once in `EVERY` seconds."""
    last, out = time.monotonic(), sys.stdout  # which is turned away while lm-eval runs

    def tell(text: str) -> None:
        nonlocal last
        if processes.is_main() and time.monotonic() - last > EVERY:
            last = time.monotonic()
            print(beginning + text, file=out, flush=True)

    return tell


def _all_sum(loss_N: Tensor) -> Tensor:
    return processes.all_sum(loss_N.to(processes.device())).cpu()
