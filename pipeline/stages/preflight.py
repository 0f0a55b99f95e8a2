"""Owns the checks before the first stage: whatever can be known to fail in any stage of the run is answered before all work.

What a stage alone knows about stands with it (`finetune.check`, `evaluate.check`, `reconstruct.check`, `check_tasks`); here is
what the stages share: model and tokenizer, texts, lengths, the disk, packages. Each takes a look and no more: of a text its
first rows, of a model its config.json and the headers of its files. For a local model all take less than 3 seconds.
"""

import itertools
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pipeline import registry
from pipeline.data import chat, sampled, sources, special_tokens, token_windows
from pipeline.evaluation.perplexity import windows
from pipeline.evaluation.tasks import hub_data
from pipeline.models import loading
from pipeline.recovery.training import batch_per_process
from pipeline.runtime import caches, checksums, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe, plain, reconstruction_text
from pipeline.stages import pretrain, space

READERS = ("prune", "reconstruct", "finetune", "evaluate")  # the stages that read text
MOST = 200_000  # tokens of a text that are counted: half a second
PACKAGES = {
    "tensorboard": "finetune.loggers=[]",
    "wandb": "finetune.loggers=[]",
    "bitsandbytes": "finetune.optimizer=adamw",
}


def check(recipe: Recipe) -> None:
    """`UserError` for the first thing found; says what was mended. All ranks must call."""
    if "finetune" in recipe.stages:
        batch_per_process(recipe.finetune, processes.world_size())
    for line in processes.from_main(_look(recipe) if processes.is_main() else None):
        processes.say(line)


def check_disk(recipe: Recipe) -> None:
    """`UserError` where the run's folder, which is there, has no room for what all its stages will write. On rank 0.

    A small model that is trained here needs next to nothing; the cells of a sweep share stages, which is not known yet.
    """
    if recipe.model is not None and processes.CELL not in os.environ:
        space.check(space.RUN, recipe, {}, Path(recipe.run_dir))


def _look(recipe: Recipe) -> list[str]:
    tokenizer, config, folder = _model(recipe)
    special_tokens.check(tokenizer, config, folder)
    _lengths(recipe, config)
    said = [f"the tokenizer of {folder}: {text}" for text in _questions(recipe, tokenizer, config)]
    said += registry.ignored(recipe)
    _packages(recipe)
    _tasks(recipe)
    texts = {stage: sources.of_stage(recipe, stage) for stage in READERS if stage in recipe.stages}
    if any(source.name not in ("world", sources.SELF) for found in texts.values() for source in found):
        caches.check_datasets()
    for stage, found in texts.items():
        for source in found:
            _text(recipe, stage, source, tokenizer, config)
    return said


def _model(recipe: Recipe) -> tuple[Any, PreTrainedConfig, str]:
    if recipe.model is None:
        from pipeline.data import world

        tokenizer = world.tokenizer()
        return tokenizer, pretrain.configuration(recipe.pretrain, tokenizer), "the small Llama"
    folder = loading.locate(recipe.model, recipe.revision)
    return loading.tokenizer(folder, recipe), loading.config(folder, recipe), recipe.model


def _lengths(recipe: Recipe, config: PreTrainedConfig) -> None:
    asked = {
        "pretrain": ("pretrain.seq_len", recipe.pretrain.seq_len),
        "prune": ("calibration.seq_len", recipe.calibration.seq_len),
        "reconstruct": ("reconstruct.seq_len", reconstruction_text(recipe).seq_len),
        "finetune": ("finetune.seq_len", recipe.finetune.seq_len),
        "evaluate": ("evaluate.seq_len", recipe.evaluate.seq_len if recipe.evaluate.perplexity else 0),
    }
    for stage, (key, seq_len) in asked.items():
        if stage in recipe.stages:
            loading.check_length(config, key, seq_len)


def _questions(recipe: Recipe, tokenizer: Any, config: PreTrainedConfig) -> list[str]:
    """What tasks and prompts need of the tokenizer; returns what was mended."""
    settings = recipe.evaluate
    if "evaluate" not in recipe.stages:
        return []
    if settings.bos and settings.perplexity:
        special_tokens.bos(tokenizer)
    prompted = settings.continuations and (settings.prompts or settings.perplexity)
    if not (settings.tasks or prompted):
        return []
    fixed, fixes = special_tokens.for_questions(tokenizer, config)
    positions = loading.positions(config)
    for prompt in settings.prompts if prompted else ():
        length = len(fixed(prompt).input_ids)
        if length == 0:
            raise UserError(f"evaluate.prompts: '{prompt}' gives no token to go on from: use a longer one")
        if positions and length >= positions:
            raise UserError(
                f"evaluate.prompts: one of {length} tokens fills the model's {positions} positions: use a shorter one"
            )
    return fixes


def _packages(recipe: Recipe) -> None:
    settings = recipe.finetune
    if "finetune" not in recipe.stages:
        return
    needed = [*settings.loggers, *(["bitsandbytes"] if settings.quantize or settings.optimizer != "adamw" else [])]
    for name in needed:
        if find_spec(name) is None:
            raise UserError(
                f"the finetune stage needs a package: run pip install {name} (or do without: {PACKAGES[name]})"
            )


def _tasks(recipe: Recipe) -> None:
    """Whether the data of tasks can be had at all; `check_tasks` has found their names, and what they read of a mirror."""
    if "evaluate" not in recipe.stages or recipe.mirror or _is_done(recipe, "evaluate"):
        return
    for task, dataset in hub_data(recipe.evaluate.tasks).items():
        if caches.is_missing(dataset):
            raise UserError(
                f"task '{task}' reads {dataset}, which is in no cache here, and HF_HUB_OFFLINE forbids to fetch it: fetch "
                "it where there is a network, set mirror=FOLDER, or leave the task out"
            )


def _text(recipe: Recipe, stage: str, source: sources.Source, tokenizer: Any, config: PreTrainedConfig) -> None:
    """Whether a text can be read and is long enough; of one of the hub, which is fetched, by a stage that is not done."""
    loss = recipe.finetune.loss if stage == "finetune" else "all"
    if source.name == sources.SELF:
        sampled.first_token(tokenizer, config)
        return
    if source.is_local:
        rows = sources.first_rows(source)
    elif _is_done(recipe, stage) or (source.name == "world" and stage != "evaluate" and loss == "all"):
        return
    else:
        rows = iter(sources.documents(source))
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source} holds no text")
    if loss != "all":
        token_windows.require_conversations(source, first)
    if chat.is_chat(first):
        token_windows.chat_tokens(first, tokenizer, source, loss)
    _long_enough(recipe, stage, source, tokenizer, itertools.chain([first], rows))


def _long_enough(recipe: Recipe, stage: str, source: sources.Source, tokenizer: Any, rows: Iterator[dict]) -> None:
    """Whether there is text for a window to evaluate, and for the samples to reconstruct by, where pruning takes others.

    Reads until there surely is; only a short text is read whole, and then as the stage will.
    """
    text, bos = reconstruction_text(recipe), None
    if stage == "evaluate":
        seq_len = recipe.evaluate.seq_len
        needed = 2 * seq_len  # a document's own special tokens are not in the joined text
        bos = special_tokens.bos(tokenizer) if recipe.evaluate.bos else None
    elif stage == "reconstruct" and source.name not in sources.KNOWN and text != recipe.calibration:
        seq_len, needed = text.seq_len, min(text.samples * text.seq_len, MOST)
    else:
        return
    there = 0
    while part := list(itertools.islice(rows, 100)):
        columns = {name: [row[name] for row in part] for name in part[0]}
        if "text" in columns:
            columns["text"] = [text[: 8 * needed] for text in columns["text"]]  # a row may be a book
        there += sum(map(len, token_windows.tokenised(columns, tokenizer, source)))
        if there >= needed:
            return
    try:
        if stage == "evaluate":
            windows(token_windows.joined(source, tokenizer, seq_len), seq_len, 1, bos)
        else:
            token_windows.calibration(source, tokenizer, text.samples, seq_len, recipe.seed, stage)
    except UserError as error:
        told = str(error)
        raise UserError(told if str(source) in told else f"{source}: {told}") from error


def _is_done(recipe: Recipe, stage: str) -> bool:
    before = checksums.read(Path(recipe.run_dir) / stage) or {}
    section = "calibration" if stage == "prune" else stage
    return (before.get("recipe") or {}).get(section) == plain(recipe)[section]
