"""Owns where text comes from: a data set's name -> the rows of one split, from the hub, a mirror or local files.

A data set is a known name (c4, wikitext2, ptb, world), a hub id, or a local file or folder of parquet, json(l)(.gz) or
txt files with a `text` column. Rows of a column `input_ids` are taken as they stand.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset

from pipeline import files
from pipeline.errors import UserError
from pipeline.recipe import Recipe, reconstruction_text

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".gz": "json", ".zst": "json", ".txt": "text"}
TOKENISED_WIKITEXT = "wikitext-2-v1"


@dataclass(frozen=True)
class Known:
    """A dataset of the pruning papers, as its hub repository names it."""

    path: str
    config: str | None
    column: str = "text"
    separators: dict | None = None  # between documents in a joined text, by split
    shards: dict | None = None  # the one file that the papers read of each split
    revision: str | None = None


KNOWN = {
    "c4": Known(
        "allenai/c4",
        "en",
        shards={"train": "c4-train.00000-of-01024.json.gz", "validation": "c4-validation.00000-of-00008.json.gz"},
        separators={"validation": " "},
    ),
    "wikitext2": Known("Salesforce/wikitext", "wikitext-2-raw-v1", separators={"train": " "}),
    "ptb": Known(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        column="sentence",
        separators={"train": " ", "test": " "},
        revision="refs/convert/parquet",  # the repository itself holds a script, which datasets 4+ do not run
    ),
}


@dataclass(frozen=True)
class Source:
    """One split of one dataset: `files` are read where there are any, else the hub's `path`."""

    name: str
    path: str
    config: str | None
    split: str
    files: tuple[str, ...] = ()
    revision: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        return self.path + (f":{self.config}" if self.config else "") + f"@{self.split}"


def source(spec: str, mirror: str | None = None, split: str = "train", config: str | None = None) -> Source:
    """Where `dataset[:config][@split]` is; a `UserError` names the file that is missing."""
    name, _, chosen_split = spec.partition("@")
    split = chosen_split or split
    if name == "world":
        return Source(name, name, None, split)
    if name.startswith((".", "/", "~")) or (Path(name).exists() and name not in KNOWN and not _in_mirror(mirror, name)):
        return Source(name, name, None, split, _local_files(Path(name).expanduser(), split))
    name, _, chosen_config = name.partition(":")
    config = chosen_config or config
    known = KNOWN.get(name, Known(name, None))
    if not config:
        config = known.config
        chosen_config = ""
    if mirror:
        files, found, note = _mirror_files(Path(mirror), known, config, split, fixed=bool(chosen_config))
        return Source(name, known.path, found, split, files, note=note)
    files = ()
    if known.shards:
        if split not in known.shards:
            raise UserError(f"{name} has no split '{split}': type one of {', '.join(known.shards)}")
        files = (f"hf://datasets/{known.path}/{config}/{known.shards[split]}",)
    return Source(name, known.path, config, split, files, known.revision)


def of_stage(recipe: Recipe, stage: str) -> list[Source]:
    """The texts that a stage reads."""
    if stage == "evaluate":
        return [
            source(spec, recipe.mirror, split="test" if spec != "c4" else "validation")
            for spec in recipe.evaluate.perplexity
        ]
    if stage == "finetune" and recipe.finetune.validation:
        held_out = [source(recipe.finetune.validation, recipe.mirror, split="validation")]
    else:
        held_out = []
    settings = {
        "prune": recipe.calibration,
        "reconstruct": reconstruction_text(recipe),
        "finetune": recipe.finetune,
    }[stage]
    return [source(settings.dataset, recipe.mirror, settings.split, settings.config), *held_out]


def identity(source: Source) -> str:
    """Changes when the text does: by content for local files, by name and revision for the hub's."""
    local = [Path(name) for name in source.files if "://" not in name]
    return files.fingerprint(local) if local else str(source.revision)


def documents(source: Source) -> Dataset:
    """The rows, with a column `text` or `input_ids`."""
    if source.name == "world":
        from pipeline import world

        return Dataset.from_dict({"text": world.documents(source.split)})
    try:
        if source.files:
            form = FORMATS[Path(source.files[0]).suffix]
            rows = load_dataset(form, data_files={source.split: list(source.files)}, split=source.split)
        else:
            rows = load_dataset(source.path, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # datasets, pyarrow, gzip and the hub each have their own
        reason = str(error.__cause__ or error) or type(error).__name__
        raise UserError(f"cannot load {source}: {' '.join(reason.split())[:300]}") from error
    column = KNOWN[source.name].column if source.name in KNOWN else "text"
    column = next((name for name in ("input_ids", column) if name in rows.column_names), None)
    if column is None:
        raise UserError(f"{source} has no column 'text' or 'input_ids': it has {', '.join(rows.column_names)}")
    rows = rows.select_columns([column])
    if rows.data.column(column).null_count:
        rows = rows.filter(lambda value: value is not None, input_columns=column)
    if len(rows) == 0:
        raise UserError(f"{source} holds no text")
    first = rows[0][column]
    ready = isinstance(first, list) and all(isinstance(token, int) for token in first)
    if not (ready if column == "input_ids" else isinstance(first, str)):
        wanted = "token ids" if column == "input_ids" else "text"
        raise UserError(f"column '{column}' of {source} should hold {wanted}: its first row is {str(first)[:60]}")
    return rows.rename_columns({column: "text"} if column == "sentence" else {})


def _in_mirror(mirror: str | None, name: str) -> bool:
    return bool(mirror) and (Path(mirror) / name).is_dir()


def _local_files(path: Path, split: str) -> tuple[str, ...]:
    """`path` itself, or the data files of a folder; where some are named after the split, only those."""
    if path.is_file():
        files = [path]
    else:
        files = sorted(p for p in path.glob("**/*") if p.suffix in FORMATS and p.is_file())
        files = [p for p in files if p.name.startswith(split)] or files
    if not files:
        raise UserError(f"no dataset at {path}: a .parquet, .json(l)(.gz) or .txt file, or a folder of them, is needed")
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{path} is empty")
    if files[0].suffix not in FORMATS:
        raise UserError(f"cannot read {files[0]}: the formats are {', '.join(FORMATS)}")
    return tuple(map(str, files))


def _mirror_files(mirror: Path, known: Known, config: str | None, split: str, fixed: bool):
    """The split's files under <mirror>/<org>/<name>/<config>/, the configuration found, and a note for the report."""
    folder = mirror / known.path
    configs = sorted(p.name for p in folder.glob("*/") if p.is_dir())
    found, note = config, None
    if config not in configs and not fixed:
        if known.path == "Salesforce/wikitext" and TOKENISED_WIKITEXT in configs:
            found = TOKENISED_WIKITEXT
            note = (
                f"WikiText-2 was read in its tokenised configuration {found} (with <unk>), which the mirror has instead of "
                f"{config}: its perplexity is not comparable with published numbers"
            )
        elif config is None:
            found = "default" if "default" in configs else (configs[0] if len(configs) == 1 else None)
    if found is None and configs:
        raise UserError(
            f"{known.path} has configurations {', '.join(configs)} in {mirror}: type {known.path}:{configs[0]}"
        )
    where = folder / (found or "default")
    files = sorted(p for p in where.glob("*") if p.name.removeprefix("c4-").startswith(split) and p.suffix in FORMATS)
    if not files:
        there = sorted({p.name.split("-")[0] for p in where.glob("*")})
        raise UserError(
            f"the mirror has no {where}/{split}-*.parquet" + (f" (splits there: {', '.join(there)})" if there else "")
        )
    return tuple(map(str, files)), found, note
