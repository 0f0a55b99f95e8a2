"""Measures a model (perplexity, tasks, accuracy, continuations) and caches the results in `<runs>/.measured/` by model,
settings and the code that measures."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from peft import PeftModel
from torch import Tensor, nn

from pipeline import tasks
from pipeline.compact.compact_model import load_compact, make_dense
from pipeline.compact.file_format import MANIFEST
from pipeline.data import images, sources, special_tokens, token_windows
from pipeline.evaluation import accuracy, continuations
from pipeline.evaluation.perplexity import (
    full_logits,
    perplexity,
    perplexity_error,
    streamed_logits,
    window_losses,
    windows,
)
from pipeline.evaluation.task_identity import identity
from pipeline.evaluation.zero_shot import mean_accuracy, zero_shot
from pipeline.models import loading, model_files, placement, processors
from pipeline.runtime import code, files, processes
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

    def _load_compact(self, recipe: Recipe, device_map: str | None = None, max_memory: dict | None = None) -> nn.Module:
        """As it is on the CPU, where it has kernels; elsewhere, and if it is split over devices, as a dense model of the same
        values."""
        model = load_compact(self.folder, recipe)
        if device_map is None:
            return model if processes.device().type == "cpu" else make_dense(model)
        make_dense(model)
        limits = {**(max_memory or {}), "cpu": sys.maxsize}  # it is in host memory already
        devices = infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
        return dispatch_model(model, devices, skip_keys=model._skip_keys_device_placement)

    def identity(self) -> str:
        """A hash of the model folder and the adapter."""
        identity_hash = model_files.identity(self.folder)
        return (
            files.digest([identity_hash, files.fingerprint(self.adapter.iterdir())]) if self.adapter else identity_hash
        )


def measure(subject: Subject, recipe: Recipe, protocol: dict) -> tuple[dict[str, Any], dict[str, dict]]:
    """The measured numbers of a model, and its per-window losses and per-question answers for `paired.difference`, with
    the "answers" to images, by data set, for `accuracy.examples`. Adds to `protocol` what was read. All ranks must call it."""
    settings, name, measurements = recipe.evaluate, subject.name, _Measurements(subject, recipe)
    read = dict(zip([*settings.perplexity, *settings.accuracy], sources.of_stage(recipe, "evaluate"), strict=True))
    found: dict[str, Any] = {"hash": measurements.hash, "perplexity": {}, "perplexity_stderr": {}, "zero_shot": {}}
    losses: dict[str, list[float]] = {}
    correct: dict[str, list[float]] = {}
    seen: dict[str, dict[str, list]] = {}  # what the model answered to the images

    for spec in settings.perplexity:
        source = read[spec]
        losses[spec] = measurements.losses(spec, source)
        found["perplexity"][spec] = value = perplexity(torch.tensor(losses[spec], dtype=torch.float64))
        if (error := perplexity_error(losses[spec])) is not None:
            found["perplexity_stderr"][spec] = error
        protocol["datasets"][spec] = (
            f"{source}, {'the first ' if settings.windows else ''}{len(losses[spec])} windows of {settings.seq_len} tokens"
        )
        if source.note and source.note not in protocol["notes"]:
            protocol["notes"].append(source.note)
        processes.say(f"  {name}: perplexity on {spec} {value:.3f}")

    for task in settings.tasks:
        scores, answers = measurements.task(task)
        found["zero_shot"] |= scores
        correct |= answers
        for entry, numbers in scores.items():
            text = ", ".join(f"{key} {value:.3f}" for key, value in numbers.items() if "stderr" not in key)
            processes.say(f"  {name}: {entry} {text}")
    if (mean := mean_accuracy(found["zero_shot"])) is not None:
        found["zero_shot_mean"] = mean

    for spec in settings.accuracy:
        seen[spec] = right = measurements.image_answers(spec, read[spec])
        scores = found.setdefault("accuracy", {})[spec] = accuracy.scores(right)
        names = loading.config(subject.folder, recipe).id2label
        found.setdefault("classes", {})[spec] = accuracy.by_class(right, names)
        protocol["datasets"][spec] = f"{read[spec]}, {len(right['acc'])} images"
        processes.say(f"  {name}: accuracy on {spec} {100 * scores['acc']:.1f}%")

    if protocol["prompts"]:
        found["continuations"], failure = measurements.continuations(protocol["prompts"])
        if failure and (note := f"no continuations: {failure}") not in protocol["notes"]:
            protocol["notes"].append(note)
            processes.say(f"  {name}: {note}")
    images_right = {spec: right["acc"] for spec, right in seen.items()}
    return found, {"losses": losses, "correct": correct, "images": images_right, "answers": seen}


class _Measurements:
    """The measurements of one model, each from the cache or else computed. The model and its tokenizer are loaded when they are
    first needed, because all results may be in the cache. All ranks must call each method."""

    def __init__(self, subject: Subject, recipe: Recipe) -> None:
        self.subject, self.recipe, self.settings = subject, recipe, recipe.evaluate
        self.hash = processes.from_main(subject.identity() if processes.is_main() else None)
        self._key = {"model": self.hash, "dtype": recipe.dtype, "attn_implementation": recipe.attn_implementation}
        self._key |= {"code": code.fingerprint(__name__)}
        cache = files.cache(Path(recipe.run_dir), ".measured") if processes.is_main() else None
        self._cache = processes.from_main(cache)

    def losses(self, spec: str, source: sources.Source) -> list[float]:
        """The loss of each window of a text."""
        key = {"text": str(source), "data": sources.identity(source), "seq_len": self.settings.seq_len}
        key |= {name: value for name in ("column", "windows", "bos") if (value := getattr(self.settings, name))}
        return self._cached(key, lambda: self._losses(spec, source))

    def task(self, task: str) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
        """See `zero_shot`."""
        settings, main = self.settings, processes.is_main()
        asked = processes.from_main(identity(task, self.recipe.mirror, settings.fewshot) if main else None)
        key = {"task": task, "asked": asked, "limit": settings.limit, "fewshot": settings.fewshot}
        return self._cached(key, lambda: self._task(task))

    def image_answers(self, spec: str, source: sources.Source) -> dict[str, list]:
        """See `accuracy.right_answers`."""
        key = {"images": str(source), "data": sources.identity(source), "limit": self.settings.limit}
        return self._cached(key | {"column": self.settings.column}, lambda: self._image_answers(spec, source))

    def continuations(self, prompts: list[str]) -> tuple[list[str], str | None]:
        """The texts, or none and why the model cannot generate, which is not cached: another version of transformers may."""
        key = {"prompts": prompts, "tokens": self.settings.continuation_tokens}
        try:
            found = self._cached(key, lambda: self._continuations(prompts)), None
        except continuations.CannotGenerate as error:
            found = [], str(error)
        return processes.from_main(found)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return processors.tokenizer(self.subject.folder, self.recipe)

    @functools.cached_property
    def _placement(self) -> str:
        return placement.choose(self.settings.placement, lambda: self.subject.load(self.recipe))

    @functools.cached_property
    def _share(self) -> placement.Share:
        return placement.share(self._placement, lambda: self.subject.load(self.recipe))

    @functools.cached_property
    def _model(self) -> nn.Module:
        return _placed(self.subject, self.recipe, self._placement, self._share)

    def _losses(self, spec: str, source: sources.Source) -> list[float]:
        settings, report = self.settings, processes.progress(f"  {self.subject.name}: perplexity on {spec}, ")
        bos = special_tokens.bos(self._tokenizer) if settings.bos else None
        ids = token_windows.joined(source, self._tokenizer, settings.seq_len)
        windows_NT = windows(ids, settings.seq_len, settings.windows, bos)
        if self._placement == "stream":
            layerwise = self.subject.load(self.recipe)
            loading.check_vocabulary(layerwise.config, windows_NT, source)
            logits = streamed_logits(layerwise, processes.device(), report)
            batch_size = placement.batch_number(settings.batch_size)
            part = (processes.rank(), processes.world_size())
        else:
            loading.check_vocabulary(self._model.config, windows_NT, source)
            logits = full_logits(self._model)
            batch_size = placement.find_batch_size(settings.batch_size, logits, windows_NT, self._share)
            part = self._share[:2]
        return window_losses(logits, windows_NT, batch_size, *part, _all_sum, report).tolist()

    def _task(self, task: str) -> tuple[dict, dict]:
        batch_size = self.settings.batch_size  # on a GPU lm-eval tries for `auto`
        if processes.device().type != "cuda":
            batch_size = placement.batch_number(batch_size)
        return zero_shot(
            self._model,
            self._tokenizer,
            [task],
            self.recipe.mirror,
            batch_size,
            self.settings.limit,
            self.settings.fewshot,
            processes.rank(),
            processes.world_size(),
            processes.progress(f"  {self.subject.name}: {task}, "),
            self._share[:2],
        )

    def _image_answers(self, spec: str, source: sources.Source) -> dict[str, list]:
        config = loading.config(self.subject.folder, self.recipe)
        processor = tasks.of(config).processor(self.subject.folder, self.recipe)
        shown = images.evaluated(source, processor, config, self.settings.limit)
        report = processes.progress(f"  {self.subject.name}: accuracy on {spec}, ")
        batch_size = placement.batch_number(self.settings.batch_size)
        return accuracy.right_answers(self._model, shown, batch_size, *self._share[:2], _all_sum, report)

    def _continuations(self, prompts: list[str]) -> list[str] | None:
        _ = self._share  # all ranks decide the placement together
        if not processes.is_main():
            return None
        return continuations.continuations(self._model, self._tokenizer, prompts, self.settings.continuation_tokens)

    def _cached(self, about: dict[str, Any], find: Callable[[], Any]) -> Any:
        """The cached measurement, the same on all ranks; with rerun=evaluate, or if there is none, the result of `find`."""
        key = self._key | about
        path = self._cache / f"{files.digest(key)}.json"
        before = None if "evaluate" in self.recipe.rerun else processes.from_main(files.read_json(path))
        if before is not None:
            return before["measured"]
        measured = find()
        if processes.is_main():
            files.write_json(path, {"about": key, "measured": measured})
        return measured


def _placed(subject: Subject, recipe: Recipe, where: str, share: placement.Share) -> nn.Module:
    """The model where it computes, or without weights if this process has nothing to compute."""
    if share.number == placement.IDLE:
        return loading.skeleton(subject.folder, recipe)
    return placement.place(share, functools.partial(subject.load, recipe), where)


def _all_sum(loss_N: Tensor) -> Tensor:
    return processes.all_sum(loss_N.to(processes.device())).cpu()
