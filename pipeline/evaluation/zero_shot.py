"""Zero-shot scores: runs lm-eval on a model in memory, with the questions split over the processes."""

import contextlib
import functools
import logging
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.data import special_tokens
from pipeline.evaluation.tasks import load_tasks
from pipeline.models import loading
from pipeline.runtime.errors import UserError

BOOTSTRAP = 1000  # draws for metrics without a closed-form standard error (F1, Matthews)
SEED, OTHER_SEED = 0, 1234  # lm-eval's defaults: Python's random; numpy and torch
NOISE = re.compile("already-initialized|not of type `str`|num_fewshot|Custom kwargs|is defined, but")


def zero_shot(
    model: torch.nn.Module,
    tokenizer: Any,
    names: list[str],
    mirror: str | None = None,
    batch_size: int | str = 8,
    limit: int | None = None,
    fewshot: int = 0,
    rank: int = 0,
    world_size: int = 1,
    report: Callable[[str], None] = lambda text: None,
    share: tuple[int, int] | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """({task: {"acc", "acc_stderr", "acc_norm", ...}}, {task: [acc of each question]}) of a Hugging Face causal LM on its
    device.

    `names`, `mirror` and `fewshot`: see `load_tasks`. `limit` is in questions per task. `batch_size`: `auto` is found by
    trying. With world_size > 1 the questions are split over the ranks of the default process group, and every rank returns
    the same. A group with its own aggregate (mmlu) is one entry without questions; any other group or tag is replaced by its
    tasks. Every name is seeded separately, so scores do not depend on the other names. The tokenizer is fixed where needed
    (`special_tokens.for_questions`). `report` gets the progress of this rank. `share` = (number, of): this rank answers every
    `of`-th question from `number` on; without one, (rank, world_size). A rank whose share is empty needs no weights.
    """
    scores: dict[str, dict[str, float]] = {}
    correct: dict[str, list[float]] = {}
    with _quiet(rank):
        from lm_eval.evaluator import evaluate

        lm = _language_model(model, tokenizer, batch_size, rank, world_size, report, share or (rank, world_size))
        for name in dict.fromkeys(names):
            random.seed(SEED)
            np.random.seed(OTHER_SEED)
            torch.manual_seed(OTHER_SEED)
            tasks = load_tasks([name], mirror, fewshot)
            # not simple_evaluate: it answers only where LOCAL_RANK is 0, and asks git, pip and nvidia-smi for versions
            try:
                found = evaluate(lm, tasks, limit=limit, bootstrap_iters=BOOTSTRAP)
            except ValueError as error:
                if "larger than population" not in str(error):
                    raise
                raise UserError(f"evaluate.fewshot={fewshot} is more than the examples of {name}: set fewer") from error
            for entry in _entries(tasks):
                scores[entry] = _numbers(found["results"][entry])
                by_question = [
                    s["acc"] for s in found["samples"].get(entry, ()) if s["filter"] == "none" and "acc" in s
                ]
                if by_question and all(isinstance(value, (int, float)) for value in by_question):
                    correct[entry] = [float(value) for value in by_question]
    return scores, correct


def mean_accuracy(scores: dict[str, dict[str, float]]) -> float | None:
    """The mean of `acc` over the tasks that have one; None if there are none."""
    accuracies = [score["acc"] for score in scores.values() if "acc" in score]
    return sum(accuracies) / len(accuracies) if accuracies else None


def _entries(tasks: dict) -> list[str]:
    """The tasks, with the tasks of an aggregated group replaced by the group."""
    groups = [group for group in tasks["groups"].values() if group.has_aggregation]
    inside = {member.name for group in groups for member in group.get_all_groups()}
    inside |= {member.task_name for group in groups for member in group.get_all_tasks()}
    return [name for name in [*(group.name for group in groups), *tasks["tasks"]] if name not in inside]


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    """{"acc,none": 0.5, "alias": "arc_easy", ...} -> {"acc": 0.5}; non-default filters keep their name."""
    return {
        metric.removesuffix(",none"): float(value)
        for metric, value in result.items()
        if "," in metric and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _language_model(
    model: torch.nn.Module,
    tokenizer: Any,
    batch_size: int | str,
    rank: int,
    world_size: int,
    report: Callable,
    share: tuple[int, int],
) -> Any:
    """lm-eval's wrapper of the model, changed to compute only this rank's share of the answers and return all.

    lm-eval's own sharding needs an Accelerator and private attributes for a model in memory, draws different few-shot
    examples per rank, and fails if a rank gets no question. So every rank prepares and scores all questions, and only the
    answers are computed in shares.
    """
    from lm_eval.models.huggingface import HFLM

    fixed_tokenizer, _ = special_tokens.for_questions(tokenizer, model.config)
    # by default lm-eval rounds log-likelihoods to the model's dtype: in bfloat16 to 0.5 at -100, so choices tie
    options = {"softmax_dtype": torch.float32, "max_length": loading.positions(model.config)}
    lm = HFLM(pretrained=model, tokenizer=fixed_tokenizer, batch_size=batch_size, **options)
    for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, method, functools.partial(_shared, getattr(lm, method), rank, world_size, share, model, report))
    return lm


def _shared(
    answer: Callable,
    rank: int,
    world_size: int,
    share: tuple[int, int],
    model: Any,
    report: Callable,
    requests: list,
    disable_tqdm: bool = False,
) -> list:
    """The answers to all requests, in order, on every rank. The choices of a question stay on one rank."""
    order = dict.fromkeys((request.task_name, request.doc_id) for request in requests)
    owner = {question: number % share[1] for number, question in enumerate(order)}
    mine = [i for i, request in enumerate(requests) if owner[request.task_name, request.doc_id] == share[0]]
    rows = 0

    def count(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        nonlocal rows
        rows += len(output.logits)
        # other requests take several rows per answer; a terminal shows lm-eval's own progress bar
        if requests[0].request_type == "loglikelihood" and not sys.stderr.isatty():
            report(f"{min(rows, len(mine))} of at most {len(mine)} answers")  # one-token answers may share a row

    counter = model.register_forward_hook(count)
    try:
        found = answer([requests[i] for i in mine], disable_tqdm=disable_tqdm or rank > 0) if mine else []
    finally:
        counter.remove()
    shares = [list(zip(mine, found, strict=True))] * world_size
    if world_size > 1:
        dist.all_gather_object(shares, shares[rank])
    answers = dict(pair for share in shares for pair in share)
    return [answers[i] for i in range(len(requests))]


@contextlib.contextmanager
def _quiet(rank: int) -> Iterator[None]:
    """Passes on rank 0's warnings, each kind once, and on a terminal its progress bars and prints."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else lm-eval bootstraps in forks: unsafe once CUDA is in use
    kinds: set[str] = set()

    def matters(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        kind = re.sub(r"\d+", "", message)
        if record.levelno < (logging.ERROR if rank else logging.WARNING) or NOISE.search(message) or kind in kinds:
            return False
        kinds.add(kind)
        return True

    logger = logging.getLogger("lm_eval")
    handler = logging.StreamHandler(sys.stderr)  # the original stream, before it is redirected
    handler.addFilter(matters)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with contextlib.ExitStack() as stack:
            if rank or not sys.stderr.isatty():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
