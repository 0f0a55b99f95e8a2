"""`evaluate`: perplexity and zero-shot tasks of a model in memory."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data import special_tokens, token_windows
from pipeline.evaluation import paired
from pipeline.evaluation.perplexity import full_logits, window_losses, windows
from pipeline.evaluation.perplexity import perplexity as of_losses
from pipeline.evaluation.tasks import check_tasks
from pipeline.evaluation.zero_shot import zero_shot
from pipeline.models import loading, placement
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Evaluate

from . import inputs, model_state
from .inputs import Texts


@inputs.in_arguments
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    perplexity: Sequence[Texts] | Mapping[str, Texts] = ("wikitext2",),
    tasks: Sequence[str] = (),
    *,
    seq_len: int = 2048,
    batch_size: int | str = 8,
    column: str | None = None,
    windows: int | None = None,
    bos: bool = False,
    limit: int | None = None,
    fewshot: int = 0,
    mirror: str | None = None,
) -> dict[str, Any]:
    """What the command measures of a model: {"perplexity": {text: ...}, "perplexity_stderr": {text: ...}, "zero_shot":
    {task: {"acc", "acc_stderr", "acc_norm", ...}}} and, where tasks have an accuracy, "zero_shot_mean".

    `perplexity` is a list of texts, or a dict of them by the names that the answer shall have; those without a name are called
    "text", "text 2" and so on. Each is cut into windows of `seq_len` tokens end to end (`windows`: the first so many; `bos`:
    each begins with that token); a tensor of token ids is one text (tokens,), or windows (N, T) as they are. `tasks` are
    lm-eval's, or .yaml files; `limit` questions of each, after `fewshot` examples. `batch_size` is in windows or questions.

    Computes on the device where the model is. Raises `UserError`.
    """
    inputs.check_model(model)
    texts = _named(perplexity)
    if isinstance(tasks, str):
        raise UserError(f"tasks is a word: set tasks=['{tasks}']")
    if not texts and not tasks:
        raise UserError("nothing to evaluate: perplexity and tasks are empty")
    chosen = {"seq_len": seq_len, "batch_size": batch_size, "column": column, "windows": windows, "bos": bos}
    chosen |= {"limit": limit, "fewshot": fewshot, "tasks": list(tasks), "perplexity": []}
    settings = inputs.recipe(["prune", "evaluate"], 0, mirror, evaluate=chosen).evaluate
    check_tasks(settings.tasks, mirror, fewshot)
    if tasks or any(not isinstance(text, Tensor) for text in texts.values()):
        tokenizer = inputs.tokenizer_of(model) if tokenizer is None else tokenizer
        inputs.check_tokenizer(tokenizer, model)
    found: dict[str, Any] = {"perplexity": {}, "perplexity_stderr": {}, "zero_shot": {}}
    with model_state.kept(model):
        cut = {name: _windows(name, text, settings, tokenizer, model, mirror) for name, text in texts.items()}
        for name, windows_NT in cut.items():
            logits, at_once = full_logits(model), placement.batch_number(batch_size)
            if model.device.type == "cuda":
                at_once = placement.find_batch_size(batch_size, logits, windows_NT)
            losses = window_losses(logits, windows_NT, at_once).tolist()
            value = of_losses(torch.tensor(losses, dtype=torch.float64))
            found["perplexity"][name] = value
            if (error := paired.standard_error(losses)) is not None:
                found["perplexity_stderr"][name] = value * error  # the error of exp(x) is exp(x) times that of x
        for task in settings.tasks:
            at_once = batch_size if model.device.type == "cuda" else placement.batch_number(batch_size)
            found["zero_shot"] |= zero_shot(model, tokenizer, [task], mirror, at_once, limit, fewshot)[0]
    accuracies = [scores["acc"] for scores in found["zero_shot"].values() if "acc" in scores]
    if accuracies:
        found["zero_shot_mean"] = sum(accuracies) / len(accuracies)
    return found


def _named(texts: Any) -> dict[str, Texts]:
    if isinstance(texts, Mapping) and not any(not isinstance(name, str) for name in texts):
        return dict(texts)
    if not isinstance(texts, list | tuple):
        raise UserError(
            f"perplexity is a {type(texts).__name__}: a list of texts, or a dict of texts by name, is needed"
        )
    found: dict[str, Texts] = {}
    for text in texts:
        name = text if isinstance(text, str) else "text" if "text" not in found else f"text {len(found) + 1}"
        if len(name) > 200:
            raise UserError(
                "perplexity is a list of texts, and a string in it the name of one: set perplexity={'mine': [...]}"
            )
        found[name] = text
    return found


def _windows(
    name: str,
    text: Texts,
    settings: Evaluate,
    tokenizer: Any,
    model: PreTrainedModel,
    mirror: str | None,
) -> Tensor:
    """(N, T), cut as the command cuts them."""
    cut = functools.partial(windows, seq_len=settings.seq_len, count=settings.windows)
    if isinstance(text, Tensor) and text.dim() == 2:
        return inputs.token_windows(text, f"perplexity[{name}]", model)[: settings.windows]
    loading.check_length(model.config, "seq_len", settings.seq_len)
    if isinstance(text, Tensor):
        where: Any = f"perplexity[{name}]"
        found = cut(inputs.token_ids(text, where, dims=1))
    else:
        split = "validation" if isinstance(text, str) and text == "c4" else "test"
        where = inputs.source(text, "evaluate", f"perplexity[{name}]", settings.column, mirror, split)
        ids = token_windows.joined(where, tokenizer, settings.seq_len)
        found = cut(ids, bos=special_tokens.bos(tokenizer) if settings.bos else None)
    inputs.check_ids(found, where, model)
    return found
