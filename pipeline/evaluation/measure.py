"""Measures a model (perplexity, tasks, accuracy, continuations) and caches the results in `<runs>/.measured/` by model,
settings and the code that measures."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pipeline import tasks
from pipeline.compact.compact_model import load_compact, make_dense
from pipeline.compact.file_format import MANIFEST
from pipeline.data import images, sources, special_tokens, token_windows
from pipeline.evaluation import accuracy, continuations, paired
from pipeline.evaluation.perplexity import full_logits, perplexity, streamed_logits, window_losses, windows
from pipeline.evaluation.tasks import identity
from pipeline.evaluation.zero_shot import zero_shot
from pipeline.models import loading, model_files, placement
from pipeline.runtime import code, files, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe


@dataclass(frozen=True)
class Subject:
    """A model folder, and its adapter if that is kept separate from the weights."""

    name: str  # dense, pruned, ...
    folder: Path
    adapter: Path | None = None

    def load(self, recipe: Recipe, **where: Any) -> nn.Module:
        """The model with its adapter, in evaluation mode. `where`: see `loading.load`."""
        if self.is_compact:
            return self._load_compact(recipe, **where)
        model = loading.load(self.folder, recipe, **where)
        if not self.adapter:
            return model
        # without a device peft takes "cuda", and each process opens a context on the first GPU
        return PeftModel.from_pretrained(model, self.adapter, torch_device="cpu").get_base_model().eval()

    @property
    def is_compact(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def _load_compact(self, recipe: Recipe, **where: Any) -> nn.Module:
        """As it is on the CPU, where it has kernels; elsewhere as a dense model of the same values."""
        if where:
            raise UserError(
                "a compact model cannot be split over devices: leave export out of stages, or set evaluate.tasks=[] and "
                "evaluate.continuations=0"
            )
        model = load_compact(self.folder, recipe)
        return model if processes.device().type == "cpu" else make_dense(model)

    def identity(self) -> str:
        """A hash of the model folder and the adapter."""
        identity_hash = model_files.identity(self.folder)
        return (
            files.digest([identity_hash, files.fingerprint(self.adapter.iterdir())]) if self.adapter else identity_hash
        )


def measure(subject: Subject, recipe: Recipe, protocol: dict) -> tuple[dict[str, Any], dict[str, dict]]:
    """The measured numbers of a model, and its per-window losses and per-question answers for `paired.difference`, with
    the "answers" to images, by data set, for `accuracy.examples`. Adds to `protocol` what was read. All ranks must call it."""
    settings, name = recipe.evaluate, subject.name
    # created at first use: everything may be in the cache
    tokenizer = functools.cache(lambda: loading.tokenizer(subject.folder, recipe))
    read = dict(zip([*settings.perplexity, *settings.accuracy], sources.of_stage(recipe, "evaluate"), strict=True))
    where = functools.cache(lambda: placement.choose(settings.placement, lambda: subject.load(recipe)))
    share = functools.cache(lambda: placement.share(where(), lambda: subject.load(recipe)))
    model = functools.cache(lambda: _placed(subject, recipe, where(), share()))
    identity_hash = processes.from_main(subject.identity() if processes.is_main() else None)
    model_key = {"model": identity_hash, "dtype": recipe.dtype, "attn_implementation": recipe.attn_implementation}
    model_key |= {"code": code.fingerprint(__name__)}
    cached = functools.partial(_cached, Path(recipe.run_dir).parent / ".measured", "evaluate" in recipe.rerun)
    found: dict[str, Any] = {"hash": identity_hash, "perplexity": {}, "perplexity_stderr": {}, "zero_shot": {}}
    losses: dict[str, list[float]] = {}
    correct: dict[str, list[float]] = {}
    seen: dict[str, dict[str, list]] = {}  # what the model answered to the images

    for spec in settings.perplexity:
        source = read[spec]

        def measure_losses(spec=spec, source=source) -> list[float]:
            report = processes.progress(f"  {name}: perplexity on {spec}, ")
            bos = special_tokens.bos(tokenizer()) if settings.bos else None
            ids = token_windows.joined(source, tokenizer(), settings.seq_len)
            windows_NT = windows(ids, settings.seq_len, settings.windows, bos)
            if where() == "stream":
                layerwise = subject.load(recipe)
                loading.check_vocabulary(layerwise.config, windows_NT, source)
                logits = streamed_logits(layerwise, processes.device(), report)
                at_once = placement.batch_number(settings.batch_size)
                part = (processes.rank(), processes.world_size())
            else:
                loading.check_vocabulary(model().config, windows_NT, source)
                logits = full_logits(model())
                at_once = placement.find_batch_size(settings.batch_size, logits, windows_NT, share())
                part = share()[:2]
            return window_losses(logits, windows_NT, at_once, *part, _all_sum, report).tolist()

        cache_key = model_key | {"text": str(source), "data": sources.identity(source), "seq_len": settings.seq_len}
        cache_key |= {key: value for key in ("column", "windows", "bos") if (value := getattr(settings, key))}
        losses[spec] = cached(cache_key, measure_losses)
        found["perplexity"][spec] = value = perplexity(torch.tensor(losses[spec], dtype=torch.float64))
        if (error := paired.standard_error(losses[spec])) is not None:
            # delta method: the error of exp(x) is exp(x) times that of x
            found["perplexity_stderr"][spec] = value * error
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
                settings.batch_size
                if processes.device().type == "cuda"
                else placement.batch_number(settings.batch_size),
                settings.limit,
                settings.fewshot,
                processes.rank(),
                processes.world_size(),
                processes.progress(f"  {name}: {task}, "),
                share()[:2],
            )

        task_identity = processes.from_main(
            identity(task, recipe.mirror, settings.fewshot) if processes.is_main() else None
        )
        cache_key = model_key | {
            "task": task,
            "asked": task_identity,
            "limit": settings.limit,
            "fewshot": settings.fewshot,
        }
        scores, answers = cached(cache_key, measure_task)
        found["zero_shot"] |= scores
        correct |= answers
        for entry, numbers in scores.items():
            text = ", ".join(f"{key} {value:.3f}" for key, value in numbers.items() if "stderr" not in key)
            processes.say(f"  {name}: {entry} {text}")
    accuracies = [scores["acc"] for scores in found["zero_shot"].values() if "acc" in scores]
    if accuracies:
        found["zero_shot_mean"] = sum(accuracies) / len(accuracies)

    for spec in settings.accuracy:
        source = read[spec]

        def measure_accuracy(spec=spec, source=source) -> dict[str, list]:
            config = loading.config(subject.folder, recipe)
            processor = tasks.of(config).processor(subject.folder, recipe)
            shown = images.evaluated(source, processor, config, settings.limit)
            report = processes.progress(f"  {name}: accuracy on {spec}, ")
            at_once = placement.batch_number(settings.batch_size)
            return accuracy.right_answers(model(), shown, at_once, *share()[:2], _all_sum, report)

        cache_key = model_key | {"images": str(source), "data": sources.identity(source), "limit": settings.limit}
        right = cached(cache_key | {"column": settings.column}, measure_accuracy)
        scores = found.setdefault("accuracy", {})[spec] = accuracy.scores(right)
        names = loading.config(subject.folder, recipe).id2label
        found.setdefault("classes", {})[spec] = accuracy.by_class(right, names)
        seen[spec] = right
        protocol["datasets"][spec] = f"{source}, {len(right['acc'])} images"
        processes.say(f"  {name}: accuracy on {spec} {100 * scores['acc']:.1f}%")

    def measure_continuations() -> list[str] | None:
        share()  # all ranks decide the placement together
        if processes.is_main():
            return continuations.continuations(model(), tokenizer(), protocol["prompts"], settings.continuation_tokens)

    if protocol["prompts"]:
        cache_key = model_key | {"prompts": protocol["prompts"], "tokens": settings.continuation_tokens}
        found["continuations"] = processes.from_main(cached(cache_key, measure_continuations))
    images_right = {spec: right["acc"] for spec, right in seen.items()}
    return found, {"losses": losses, "correct": correct, "images": images_right, "answers": seen}


def _placed(subject: Subject, recipe: Recipe, where: str, share: placement.Share) -> nn.Module:
    """The model where it computes, or without weights if this process has nothing to compute."""
    if share.number == placement.IDLE:
        return loading.skeleton(subject.folder, recipe)
    return placement.place(share, functools.partial(subject.load, recipe), where)


def _cached(cache: Path, again: bool, key: dict, find: Callable[[], Any]) -> Any:
    """The cached measurement; else, or if `again`, the result of `find`, which is then cached. The same on all ranks."""
    path = cache / f"{files.digest(key)}.json"
    before = None if again else processes.from_main(files.read_json(path))
    if before is not None:
        return before["measured"]
    measured = find()
    if processes.is_main():
        files.write_json(path, {"about": key, "measured": measured})
    return measured


def _all_sum(loss_N: Tensor) -> Tensor:
    return processes.all_sum(loss_N.to(processes.device())).cpu()
