"""Owns the text: where a dataset's rows come from, and the token windows that are cut from them.

A dataset is a known name (c4, wikitext2, ptb, world), a hub id, or a local file or folder of parquet, json(l)(.gz) or
txt files with a `text` column. Rows of a column `input_ids` are taken as they stand.
"""

import random
from array import array
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch import Tensor

from pipeline import files
from pipeline.errors import UserError
from pipeline.recipe import Recipe

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


def sources_of(recipe: Recipe, stage: str) -> list[Source]:
    """The texts that a stage reads."""
    if stage == "evaluate":
        return [
            source(spec, recipe.mirror, split="test" if spec != "c4" else "validation")
            for spec in recipe.evaluate.perplexity
        ]
    settings = recipe.calibration if stage == "prune" else recipe.finetune
    return [source(settings.dataset, recipe.mirror, settings.split, settings.config)]


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
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {source}: {' '.join(str(error).split())[:300]}") from error
    column = KNOWN[source.name].column if source.name in KNOWN else "text"
    for candidate in ("input_ids", column):
        if candidate in rows.column_names:
            return rows.select_columns([candidate]).rename_columns(
                {} if candidate != "sentence" else {candidate: "text"}
            )
    raise UserError(f"{source} has no column 'text' or 'input_ids': it has {', '.join(rows.column_names)}")


def joined(source: Source, tokenizer) -> Tensor:
    """All tokens of the split as one row, (tokens,): the documents joined as the papers join them (default a blank line)."""
    rows = documents(source)
    if "input_ids" in rows.column_names:
        return torch.tensor([token for ids in rows["input_ids"] for token in ids])
    known = KNOWN.get(source.name)
    separator = (known.separators if known and known.separators else {}).get(source.split, "\n\n")
    if source.name == "c4" and source.split == "validation":
        rows = rows.select(range(min(1100, len(rows))))  # the papers' excerpt: 256 windows of its first 1100 documents
    return _ids(tokenizer, separator.join(rows["text"]))


def packed(source: Source, tokenizer, seq_len: int, samples: int, seed: int) -> Tensor:
    """(samples, seq_len) windows of the documents in a shuffled order, end to end; the order begins anew when it ends."""
    rows = documents(source)
    order = list(range(len(rows)))
    draw = random.Random(seed)
    tokens = array("i")  # a list of Python ints takes nine times the memory
    while len(tokens) < samples * seq_len:
        draw.shuffle(order)
        before = len(tokens)
        for row in order:
            tokens.extend(_document(rows[row], tokenizer))
            if len(tokens) >= samples * seq_len:
                break
        if len(tokens) == before:
            raise UserError(f"{source} holds no text")
    return torch.frombuffer(tokens, dtype=torch.int32)[: samples * seq_len].view(samples, seq_len)


def calibration(source: Source, tokenizer, samples: int, seq_len: int, seed: int) -> Tensor:
    """(samples, seq_len) token windows, drawn as the papers draw them for c4 and wikitext2, else packed and no token twice.

    C4: documents at random until one is longer than seq_len tokens, then a random window of it (SparseGPT and Wanda).
    WikiText-2 and PTB: random windows of the joined text.
    """
    if source.name == "c4":
        return _windows_of_documents(source, tokenizer, samples, seq_len, random.Random(seed))
    if source.name in KNOWN:
        ids = joined(source, tokenizer)
        if len(ids) <= seq_len:
            raise UserError(
                f"{source} has {len(ids)} tokens, too few for a window: type calibration.seq_len={len(ids) // 2}"
            )
        draw = random.Random(seed)
        starts = [draw.randint(0, len(ids) - seq_len - 1) for _ in range(samples)]
        return torch.stack([ids[start : start + seq_len] for start in starts])
    available = _count_up_to(documents(source), tokenizer, samples * seq_len)
    if available < samples * seq_len:
        raise UserError(
            f"{source} has {available} tokens, calibration asks for {samples} x {seq_len}: "
            f"type calibration.samples={max(1, available // seq_len)} or a shorter calibration.seq_len"
        )
    return packed(source, tokenizer, seq_len, samples, seed)


def _windows_of_documents(source: Source, tokenizer, samples: int, seq_len: int, draw: random.Random) -> Tensor:
    rows = documents(source)
    windows = []
    misses = 0
    while len(windows) < samples:
        ids = torch.tensor(_raw_ids(rows[draw.randint(0, len(rows) - 1)], tokenizer))
        if len(ids) <= seq_len:
            misses += 1
            if misses > 100 * samples + 10 * len(rows):
                raise UserError(
                    f"{source} has hardly a document of more than {seq_len} tokens: type a shorter calibration.seq_len"
                )
            continue
        start = draw.randint(0, len(ids) - seq_len - 1)
        windows.append(ids[start : start + seq_len])
    return torch.stack(windows)


def _ids(tokenizer, text: str) -> Tensor:
    return torch.tensor(
        tokenizer(text, verbose=False).input_ids
    )  # verbose: no warning that all of it exceeds the context


def _raw_ids(row: dict, tokenizer) -> list[int]:
    return row["input_ids"] if "input_ids" in row else tokenizer(row["text"], verbose=False).input_ids


def _document(row: dict, tokenizer) -> list[int]:
    """The tokens of a document, ended by the tokenizer's end-of-sequence token where it has one."""
    ids = _raw_ids(row, tokenizer)
    if "input_ids" in row or tokenizer.eos_token_id is None or (ids and ids[-1] == tokenizer.eos_token_id):
        return ids
    return [*ids, tokenizer.eos_token_id]


def _count_up_to(rows: Dataset, tokenizer, enough: int) -> int:
    count = 0
    for row in rows:
        count += len(_document(row, tokenizer))
        if count >= enough:
            break
    return count


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
