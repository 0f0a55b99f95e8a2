"""Resolves a data set's name to the files of one split: from the hub, a mirror or local files.

A data set is a known name (c4, wikitext2, ptb, world; of images: imagenet, digits), `self` (text written by the dense model,
see data/sampled.py), a hub id, or a local file or folder (data/text_files.py and data/image_files.py have the rules for these).
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from pipeline.data import digits, image_files, text_files, text_rows
from pipeline.data.text_rows import documents, first_rows
from pipeline.runtime import files
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import READERS, Recipe, reconstruction_text

__all__ = ["documents", "first_rows", "held_out_split", "identity", "of_stage", "of_text", "source"]

TOKENISED_WIKITEXT = "wikitext-2-v1"
SELF = "self"
GENERATED = ("world", SELF)  # text that no file holds


@dataclass(frozen=True)
class Known:
    """A dataset of the pruning papers, or of images: its hub repository and how the papers read it."""

    path: str
    config: str | None
    column: str = "text"
    separators: dict | None = None  # between documents when joined, by split
    shards: dict | None = None  # the single file per split that the papers read
    revision: str | None = None
    held_out: str = "test"  # the split that is evaluated


KNOWN = {
    "c4": Known(
        "allenai/c4",
        "en",
        shards={"train": "c4-train.00000-of-01024.json.gz", "validation": "c4-validation.00000-of-00008.json.gz"},
        separators={"validation": " "},
        held_out="validation",
    ),
    "wikitext2": Known("Salesforce/wikitext", "wikitext-2-raw-v1", separators={"train": " "}),
    "ptb": Known(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        column="sentence",
        separators={"train": " ", "test": " "},
        revision="refs/convert/parquet",  # the main branch is a script, which datasets 4+ does not run
    ),
    # its test split has no labels
    "imagenet": Known("ILSVRC/imagenet-1k", None, column="image", held_out="validation"),
}


@dataclass(frozen=True)
class Source:
    """One split of one dataset: `rows` in memory, else the `files` if there are any, else the hub's `path`.

    `columns` are candidates for the text; the first present is used (see text_rows). `section` is the recipe section that
    chose the data set.
    """

    name: str
    path: str
    config: str | None
    split: str
    files: tuple[str, ...] = ()
    revision: str | None = None
    note: str | None = None
    form: str | None = None  # of the files: see text_files
    columns: tuple[tuple[str, ...], ...] = text_rows.COLUMNS
    section: str = "calibration"
    rows: Dataset | None = field(default=None, compare=False)

    def __str__(self) -> str:
        if self.rows is not None:
            return self.name
        return self.path + (f":{self.config}" if self.config else "") + f"@{self.split}"

    @property
    def is_local(self) -> bool:
        """Whether its rows can be read now, without the hub."""
        return bool(self.files) and "://" not in self.files[0]


def source(
    spec: str,
    mirror: str | None = None,
    split: str = "train",
    config: str | None = None,
    column: str | None = None,
    section: str = "calibration",
) -> Source:
    """Resolves `dataset[:config][@split]`. Raises `UserError` naming the missing file or the splits that exist."""
    if not spec.strip():
        raise UserError(f"{section}.dataset is empty: set a data set, such as c4 or ./text.jsonl")
    name, chosen_config, chosen_split = _parts(spec)
    split, config = chosen_split or split, chosen_config or config
    reads = {"columns": ((column,),) if column else text_rows.COLUMNS, "section": section}
    if name in (*GENERATED, digits.NAME):
        return Source(name, name, None, split, **reads)
    where = _path(name)
    if name.startswith((".", "/", "~")) or (where.exists() and name not in KNOWN and not _in_mirror(mirror, name)):
        if images := image_files.find(where, split, named=bool(chosen_split)):
            paths = tuple(map(str, images))
            return Source(name, name, config, split, paths, form=image_files.IMAGES, **reads)
        found = text_files.find(where, split, config, named=bool(chosen_split))
        return Source(name, name, config, split, _absolute(found), form=found.form, **reads)
    known = KNOWN.get(name, Known(name, None))
    if name in KNOWN and known.column != "image":
        reads["columns"] = (("input_ids",), (known.column,))
    fixed = bool(chosen_config)
    config = config or known.config
    if mirror:
        found, config, note = _in_mirror_files(_path(mirror), known, config, split, fixed)
        return Source(name, known.path, config, split, _absolute(found), note=note, form=found.form, **reads)
    hub_files, form = (), None
    if known.shards:
        if split not in known.shards:
            raise UserError(f"{name} has no split '{split}': use one of {', '.join(known.shards)}")
        hub_files, form = (f"hf://datasets/{known.path}/{config}/{known.shards[split]}",), "json"
    return Source(name, known.path, config, split, hub_files, known.revision, form=form, **reads)


def of_text(text: Any, mirror: str | None, section: str) -> Source:
    """Resolves the data set of a recipe section, or any object with `dataset`, `split`, `config` and `column`."""
    return source(text.dataset, mirror, text.split, text.config, text.column, section)


def of_stage(recipe: Recipe, stage: str) -> list[Source]:
    """The texts that a stage reads. Raises `UserError` as `source` does."""
    section = READERS[stage]
    if section == "evaluate":
        settings = recipe.evaluate
        return [
            source(spec, recipe.mirror, held_out_split(spec), None, settings.column, "evaluate")
            for spec in (*settings.perplexity, *settings.accuracy)
        ]
    text = getattr(recipe, section)
    if section == "reconstruct":
        text, section = reconstruction_text(recipe), section if recipe.reconstruct.dataset else "calibration"
    found = [of_text(text, recipe.mirror, section)]
    if section == "finetune" and recipe.finetune.validation:
        spec, column = recipe.finetune.validation, recipe.finetune.column
        found.append(source(spec, recipe.mirror, "validation", None, column, "finetune"))
    return found


def held_out_split(spec: str) -> str:
    """The split to evaluate, unless the name of a data set has another."""
    return KNOWN[spec].held_out if spec in KNOWN else "test"


def identity(source: Source) -> str:
    """Changes with the data: a fingerprint of local files, else the hub revision."""
    if source.form == image_files.IMAGES:
        return image_files.identity(source.files)
    return files.fingerprint(map(Path, source.files)) if source.is_local else str(source.revision)


def _parts(spec: str) -> tuple[str, str | None, str | None]:
    """(name or path, configuration, split); an existing path may contain `@` and `:`."""
    if _path(spec).exists():
        return spec, None, None
    name, _, split = spec.rpartition("@")
    if not name or "/" in split:
        name, split = spec, ""
    if _path(name).exists():
        return name, None, split or None
    path, _, config = name.rpartition(":")
    if not path or "/" in config:
        path, config = name, ""
    return path, config or None, split or None


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # Path.expanduser raises for an unknown user


def _absolute(found: text_files.SplitFiles) -> tuple[str, ...]:
    return tuple(str(path.absolute()) for path in found.paths)


def _in_mirror(mirror: str | None, name: str) -> bool:
    return bool(mirror) and (_path(mirror) / name).is_dir()


def _in_mirror_files(mirror: Path, known: Known, config: str | None, split: str, fixed: bool):
    """The split's files under <mirror>/<org>/<name>/<config>/, the configuration used, and a note for the report."""
    folder = mirror / known.path
    configs = sorted(p.name for p in folder.glob("*/") if p.is_dir())
    found, note = config, None
    if config not in configs and not fixed:
        if known.path == "Salesforce/wikitext" and TOKENISED_WIKITEXT in configs:
            found = TOKENISED_WIKITEXT
            note = (
                f"WikiText-2 was read in its tokenised configuration {found} (with <unk>), as the mirror lacks {config}: "
                "its perplexity is not comparable with published numbers"
            )
        elif config is None:
            found = "default" if "default" in configs else (configs[0] if len(configs) == 1 else None)
    if found is None and configs:
        raise UserError(
            f"{known.path} has configurations {', '.join(configs)} in {mirror}: set {known.path}:{configs[0]}"
        )
    where = folder / (found or "default")
    splits: list[str] = []
    if where.is_dir():
        try:
            return text_files.find(where, split, named=True), found, note
        except text_files.NoSplit as error:
            splits = error.splits
        except UserError:
            if any(where.glob(f"*{split}*")):
                raise
    raise UserError(
        f"the mirror has no {where}/{split}-*.parquet" + (f" (splits there: {', '.join(splits)})" if splits else "")
    )
