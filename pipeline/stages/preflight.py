"""The checks before the first stage, for all stages of the run: model and tokenizer, texts or images, lengths, disk space,
packages.

Checks of a single stage are in its file (`finetune.check` and so on). The checks read only the first rows of a text, and a
model's config.json and the headers of its files: less than 3 seconds for a local model.
"""

import itertools
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pipeline import registry, tasks
from pipeline.data import chat, digits, images, sampled, sources, special_tokens, token_windows, world
from pipeline.evaluation.perplexity import windows
from pipeline.evaluation.tasks import hub_data
from pipeline.models import loading
from pipeline.recovery.training import batch_per_process
from pipeline.recovery.training_dtype import precision
from pipeline.runtime import caches, checksums, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import READERS, STAGES, Recipe, plain, reconstruction_text
from pipeline.stages import pretrain, space

MAX_COUNTED = 200_000  # tokens of a text that are counted: half a second
PACKAGES = {
    "tensorboard": "finetune.loggers=[]",
    "wandb": "finetune.loggers=[]",
    "bitsandbytes": "finetune.optimizer=adamw",
}


def check(recipe: Recipe) -> None:
    """Raises `UserError` for the first problem; prints warnings. All ranks must call."""
    if "finetune" in recipe.stages:
        batch_per_process(recipe.finetune, processes.world_size())
        if not _is_done(recipe, "finetune"):
            precision(recipe.finetune.precision)
    for line in processes.from_main(_check(recipe) if processes.is_main() else None):
        processes.say(line)


def check_disk(recipe: Recipe) -> None:
    """Raises `UserError` if the disk of the run folder has no room for all stages. On rank 0.

    Skipped for pretrain recipes, whose model is tiny, and for the cells of a sweep, which share stages.
    """
    if recipe.model is not None and processes.CELL not in os.environ:
        space.check(space.RUN, recipe, {}, Path(recipe.run_dir))


def _check(recipe: Recipe) -> list[str]:
    """Returns warnings."""
    processor, config, folder = _model(recipe)
    task = tasks.of(config)
    task.check(recipe, folder)
    warnings = _check_language(recipe, processor, config, folder) if task.reads_text else []
    warnings += [*registry.ignored(recipe), *_left_out(recipe)]
    _check_packages(recipe)
    reading = [stage for stage in READERS if stage in recipe.stages]
    texts = [(stage, source) for stage in reading for source in sources.of_stage(recipe, stage)]
    if any(source.name not in (*sources.GENERATED, digits.NAME) for _, source in texts):
        caches.check_datasets()
    for stage, source in texts:
        if task.reads_text:
            _check_text(recipe, stage, source, processor, config)
        elif not _is_done(recipe, stage):
            _check_images(recipe, stage, source, processor, config)
    return warnings


def _left_out(recipe: Recipe) -> Iterator[str]:
    """Finished stages of the run folder that the stages to run would read if they were in `stages`: with stages=[evaluate] the
    dense model alone would be measured, and replace the results of the whole run."""
    for name in STAGES:
        readers = [stage for stage in STAGES.values() if stage.name in recipe.stages and name in (stage.reads or ())]
        if name not in recipe.stages and readers and checksums.read(Path(recipe.run_dir) / name):
            named = ", ".join(stage.name for stage in readers)
            yield (
                f"{Path(recipe.run_dir) / name} is finished, but {name} is not in stages: {named} will not read it (a finished "
                "stage in stages is not run again)"
            )


def _check_language(recipe: Recipe, tokenizer: Any, config: PreTrainedConfig, folder: str) -> list[str]:
    """The checks of language models alone; returns warnings."""
    special_tokens.check(tokenizer, config, folder)
    _check_lengths(recipe, config)
    _check_task_data(recipe)
    return [f"the tokenizer of {folder}: {text}" for text in _check_prompts(recipe, tokenizer, config)]


def _check_images(recipe: Recipe, stage: str, source: sources.Source, processor: Any, config: PreTrainedConfig) -> None:
    """Raises `UserError` if the first image cannot be read, there are too few, or the classes are not the model's."""
    settings = {"calibration": recipe.calibration, "reconstruct": reconstruction_text(recipe)}.get(READERS[stage])
    if settings:
        found = images.drawn(source, processor, config, settings.samples, recipe.seed, source.section)
    else:
        found = images.evaluated(source, processor, config, None)
    found[0]


def _model(recipe: Recipe) -> tuple[Any, PreTrainedConfig, str]:
    """Tokenizer or image processor, config and name of the dense model."""
    if recipe.model is None:
        toy = pretrain.toy(recipe.pretrain)
        return toy.processor, toy.config, f"the {toy.name}"
    folder = loading.locate(recipe.model, recipe.revision)
    config = loading.config(folder, recipe)
    return tasks.of(config).processor(folder, recipe), config, recipe.model


def _check_lengths(recipe: Recipe, config: PreTrainedConfig) -> None:
    lengths = {
        "pretrain": recipe.pretrain.seq_len,
        "calibration": recipe.calibration.seq_len,
        "reconstruct": reconstruction_text(recipe).seq_len,
        "finetune": recipe.finetune.seq_len,
        "evaluate": recipe.evaluate.seq_len if recipe.evaluate.perplexity else 0,
    }
    for stage in STAGES:
        section = READERS.get(stage, stage)
        if stage in recipe.stages and section in lengths:
            loading.check_length(config, f"{section}.seq_len", lengths[section])


def _check_prompts(recipe: Recipe, tokenizer: Any, config: PreTrainedConfig) -> list[str]:
    """Checks what tasks and prompts need of the tokenizer; returns what had to be fixed in it."""
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
            raise UserError(f"evaluate.prompts: '{prompt}' has no token to continue from: set a longer one")
        if positions and length >= positions:
            raise UserError(
                f"evaluate.prompts: a prompt of {length} tokens fills the model's {positions} positions: set a shorter one"
            )
    return fixes


def _check_packages(recipe: Recipe) -> None:
    settings = recipe.finetune
    if "finetune" not in recipe.stages:
        return
    needed = [*settings.loggers, *(["bitsandbytes"] if settings.quantize or settings.optimizer != "adamw" else [])]
    for name in needed:
        if find_spec(name) is None:
            raise UserError(f"the finetune stage needs a package: run `pip install {name}`, or set {PACKAGES[name]}")


def _check_task_data(recipe: Recipe) -> None:
    """Raises `UserError` if a task's data cannot be loaded offline; `check_tasks` has checked names and mirror."""
    if "evaluate" not in recipe.stages or recipe.mirror or _is_done(recipe, "evaluate"):
        return
    for task, dataset in hub_data(recipe.evaluate.tasks).items():
        if caches.is_missing(dataset):
            raise UserError(
                f"task '{task}' reads {dataset}, which is in no cache, and HF_HUB_OFFLINE is set: download it with a network, "
                "set mirror=FOLDER, or leave the task out"
            )


def _check_text(recipe: Recipe, stage: str, source: sources.Source, tokenizer: Any, config: PreTrainedConfig) -> None:
    """Raises `UserError` if a text cannot be read or is too short. A hub text is downloaded unless the stage is done."""
    loss = recipe.finetune.loss if stage == "finetune" else "all"
    if source.name == sources.SELF:
        sampled.first_token(tokenizer, config)
        return
    if source.name == "world":
        world.check_split(source.split)  # generating it takes a second
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
    _check_amount(recipe, stage, source, tokenizer, itertools.chain([first], rows))


def _check_amount(recipe: Recipe, stage: str, source: sources.Source, tokenizer: Any, rows: Iterator[dict]) -> None:
    """Raises `UserError` if the text is too short for one window to evaluate, or for the reconstruction's own samples.

    Counts tokens only until there are enough; a text with fewer is read as the stage would read it.
    """
    text, bos = reconstruction_text(recipe), None
    if stage == "evaluate":
        seq_len = recipe.evaluate.seq_len
        needed = 2 * seq_len  # twice, because the joined text lacks each document's special tokens
        bos = special_tokens.bos(tokenizer) if recipe.evaluate.bos else None
    elif stage == "reconstruct" and source.name not in sources.KNOWN and text != recipe.calibration:
        seq_len, needed = text.seq_len, min(text.samples * text.seq_len, MAX_COUNTED)
    else:
        return
    counted = 0
    while part := list(itertools.islice(rows, 100)):
        columns = {name: [row[name] for row in part] for name in part[0]}
        if "text" in columns:
            columns["text"] = [text[: 8 * needed] for text in columns["text"]]  # a row may be a book
        counted += sum(map(len, token_windows.tokenised(columns, tokenizer, source)))
        if counted >= needed:
            return
    try:
        if stage == "evaluate":
            windows(token_windows.joined(source, tokenizer, seq_len), seq_len, 1, bos)
        else:
            token_windows.calibration(source, tokenizer, text.samples, seq_len, recipe.seed, stage)
    except UserError as error:
        message = str(error)
        raise UserError(message if str(source) in message else f"{source}: {message}") from error


def _is_done(recipe: Recipe, stage: str) -> bool:
    """Whether the stage is finished with these settings, perhaps on another machine."""
    before, now = (checksums.read(Path(recipe.run_dir) / stage) or {}).get("recipe") or {}, plain(recipe)
    same = all(before.get(key) == now[key] for key in ("model", "revision", READERS[stage]))
    return same and stage not in recipe.rerun
