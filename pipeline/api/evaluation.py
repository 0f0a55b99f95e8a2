"""`evaluate`: perplexity and zero-shot tasks of a model in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data import images, sources, special_tokens, token_windows
from pipeline.evaluation.accuracy import right_answers, scores
from pipeline.evaluation.perplexity import full_logits, perplexity_error, window_losses, windows
from pipeline.evaluation.perplexity import perplexity as of_losses
from pipeline.evaluation.tasks import check_tasks
from pipeline.evaluation.zero_shot import mean_accuracy, zero_shot
from pipeline.models import loading, placement
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Evaluate

from . import image_inputs, inputs, model_state
from .inputs import Texts


@inputs.api_function
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    perplexity: Sequence[Texts] | Mapping[str, Texts] | None = None,
    tasks: Sequence[str] = (),
    accuracy: Sequence[Texts] | Mapping[str, Texts] = (),
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
    """Measures perplexity and zero-shot tasks as the command does. Returns {"perplexity": {text: ...},
    "perplexity_stderr": {text: ...}, "zero_shot": {task: {"acc", "acc_stderr", "acc_norm", ...}}} and "zero_shot_mean", if
    tasks have an accuracy.

    `perplexity`: a list of texts, or a dict of texts by name; unnamed ones are called "text", "text 2" and so on. Each is cut
    into consecutive windows of `seq_len` tokens (`windows`: only the first N; `bos`: each begins with BOS). A tensor of token
    ids is one text (tokens,), or windows (N, T), which `bos` does not fit. `tasks`: names of lm-eval or .yaml files, with
    `limit` questions each and `fewshot` examples. `batch_size`: windows, questions or images at a time.

    Of an image classifier only `accuracy`, a list or dict of data sets of images, is measured: {"accuracy": {data set: {"acc",
    "acc_stderr", "acc_top5", ...}}}, on `limit` images of each; `tokenizer` is its image processor.

    Runs on the model's device. Raises `UserError`.
    """
    inputs.check_model(model, may_be_compact=True)
    if image_inputs.are_read_by(model):
        if perplexity or tasks:
            raise UserError(f"{type(model).__name__} reads images: set accuracy=[...] instead of perplexity and tasks")
        chosen = {"batch_size": batch_size, "column": column, "limit": limit}
        settings = inputs.recipe(["prune", "evaluate"], 0, mirror, evaluate=chosen).evaluate
        return _image_accuracy(model, tokenizer, accuracy, settings, mirror)
    if accuracy:
        raise UserError(f"accuracy is for image classifiers, and {type(model).__name__} is none: leave it out")
    texts = _named(("wikitext2",) if perplexity is None else perplexity)
    if isinstance(tasks, str):
        raise UserError(f"tasks is a string: set tasks=['{tasks}']")
    if not texts and not tasks:
        raise UserError("nothing to evaluate: set perplexity=[...] or tasks=[...]")
    chosen = {"seq_len": seq_len, "batch_size": batch_size, "column": column, "windows": windows, "bos": bos}
    chosen |= {"limit": limit, "fewshot": fewshot, "tasks": list(tasks), "perplexity": []}
    settings = inputs.recipe(["prune", "evaluate"], 0, mirror, evaluate=chosen).evaluate
    check_tasks(settings.tasks, mirror, fewshot)
    if tasks or bos or any(not isinstance(text, Tensor) for text in texts.values()):
        tokenizer = inputs.tokenizer_of(model) if tokenizer is None else tokenizer
        inputs.check_tokenizer(tokenizer, model)
    with model_state.preserved(model):
        windows_by_name = {
            name: _windows(name, text, settings, tokenizer, model, mirror) for name, text in texts.items()
        }
        results = _perplexity(model, windows_by_name, settings.batch_size)
        return results | _zero_shot(model, tokenizer, settings, mirror)


def _perplexity(model: PreTrainedModel, windows_by_name: dict[str, Tensor], batch_size: int | str) -> dict[str, Any]:
    results: dict[str, Any] = {"perplexity": {}, "perplexity_stderr": {}}
    for name, windows_NT in windows_by_name.items():
        logits, count = full_logits(model), placement.batch_number(batch_size)
        if model.device.type == "cuda":
            count = placement.find_batch_size(batch_size, logits, windows_NT, placement.Share(0, 1))
        losses = window_losses(logits, windows_NT, count).tolist()
        results["perplexity"][name] = of_losses(torch.tensor(losses, dtype=torch.float64))
        if (error := perplexity_error(losses)) is not None:
            results["perplexity_stderr"][name] = error
    return results


def _zero_shot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: Evaluate, mirror: str | None
) -> dict[str, Any]:
    found, size = {}, settings.batch_size
    count = size if model.device.type == "cuda" else placement.batch_number(size)
    for task in settings.tasks:
        found |= zero_shot(model, tokenizer, [task], mirror, count, settings.limit, settings.fewshot)[0]
    mean = mean_accuracy(found)
    return {"zero_shot": found} | ({} if mean is None else {"zero_shot_mean": mean})


def _image_accuracy(
    model: PreTrainedModel,
    processor: Any,
    sets: Any,
    settings: Evaluate,
    mirror: str | None,
) -> dict[str, Any]:
    if not sets:
        raise UserError("nothing to evaluate: set accuracy=[...] to data sets of images")
    processor, found = image_inputs.processor_of(model, processor), {}
    with model_state.preserved(model):
        for name, data in _named(sets, "accuracy", "images").items():
            split = sources.held_out_split(data) if isinstance(data, str) else "test"
            source = image_inputs.source(data, "evaluate", f"accuracy[{name}]", settings.column, mirror, split)
            shown = images.evaluated(source, processor, model.config, settings.limit)
            right = right_answers(model, shown, placement.batch_number(settings.batch_size))
            found[name] = scores(right)
    return {"accuracy": found}


def _named(texts: Any, argument: str = "perplexity", kind: str = "text") -> dict[str, Texts]:
    if isinstance(texts, Mapping) and not any(not isinstance(name, str) for name in texts):
        return dict(texts)
    if not isinstance(texts, list | tuple):
        raise UserError(
            f"{argument} is a {type(texts).__name__}: a list of {kind.rstrip('s')}s, or a dict of them by name, is needed"
        )
    named: dict[str, Texts] = {}
    for text in texts:
        name = text if isinstance(text, str) else kind if kind not in named else f"{kind} {len(named) + 1}"
        if len(name) > 200:
            raise UserError(
                f"a string in {argument} is the name of a data set: for a text set {argument}={{'mine': [...]}}"
            )
        named[name] = text
    return named


def _windows(
    name: str,
    text: Texts,
    settings: Evaluate,
    tokenizer: Any,
    model: PreTrainedModel,
    mirror: str | None,
) -> Tensor:
    """The windows of a text, (N, T), as the command cuts them."""
    if isinstance(text, Tensor) and text.dim() == 2:
        if settings.bos:
            raise UserError(
                f"perplexity[{name}] holds windows, which do not change: set bos=False, and begin them with BOS"
            )
        return inputs.token_windows(text, f"perplexity[{name}]", model, has_loss=True)[: settings.windows]
    loading.check_length(model.config, "seq_len", settings.seq_len)
    where: Any
    if isinstance(text, Tensor):
        where = f"perplexity[{name}]"
        ids = inputs.token_ids(text, where, dims=1)
    else:
        split = "validation" if isinstance(text, str) and text == "c4" else "test"
        where = inputs.source(text, "evaluate", f"perplexity[{name}]", settings.column, mirror, split)
        ids = token_windows.joined(where, tokenizer, settings.seq_len)
    bos = special_tokens.bos(tokenizer) if settings.bos else None
    windows_NT = windows(ids, settings.seq_len, settings.windows, bos)
    inputs.check_ids(windows_NT, where, model)
    return windows_NT
