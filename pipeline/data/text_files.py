"""Finds the files of a folder that hold the text of a split, by one table of rules for formats, metadata and split names.

The rules are those of the hub and of `datasets` (huggingface.co/docs/hub/datasets-file-names-and-splits), but anything
ambiguous is refused: a missing split, several configurations, files of several formats.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json

FORMATS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "text",
    ".csv": "csv",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # after a text format, as in .jsonl.gz
SAVED = "saved"  # the form of a folder written by `save_to_disk` of datasets

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHARD = re.compile(r"(.+?)[-._]\d+-of-\d+.*")  # train-00000-of-00001, c4-train.00000-of-01024
# files that describe a data set, by name up to the first dot
METADATA = {
    "json": re.compile(
        r"dataset_infos?|dataset_dict|state|meta|metadata|info|stats|statistics|config|index|manifest|croissant", re.I
    ),
    "text": re.compile(r"read_?me|licen[sc]e|requirements", re.I),
}
LFS = b"version https://git-lfs"


class SplitFiles(NamedTuple):
    """The files of a split in reading order, and their form: a value of FORMATS, or SAVED."""

    form: str
    paths: tuple[Path, ...]


class SplitName(NamedTuple):
    """What a file or folder name says about its split: its own spelling, the usual split it stands for, and whether it
    certainly is one."""

    name: str | None = None
    standard: str | None = None
    certain: bool = False


class NoSplit(UserError):
    """The split does not exist; `splits` are those that do."""

    def __init__(self, text: str, splits: list[str]) -> None:
        super().__init__(text)
        self.splits = splits


def find(path: Path, split: str, config: str | None = None, named: bool = False) -> SplitFiles:
    """The files of `split` at `path`, a file or a folder.

    `config` is a subfolder. `named`: the user named the split, so files without a split name do not count; otherwise they
    are all read. Raises `UserError` if something is missing or ambiguous.
    """
    if config and path.is_dir():
        folders = [folder for folder in (path / config, path / "data" / config) if folder.is_dir()]
        if not folders:
            existing = sorted(p.name for p in path.glob("*/") if p.is_dir() and not p.name.startswith("."))
            raise UserError(
                f"{path} has no configuration '{config}'" + (f": it has {', '.join(existing)}" if existing else "")
            )
        path = folders[0]
    if path.is_file():
        return _check_readable(path, _single_file(path, split, named))
    if not path.is_dir():
        raise UserError(f"no dataset at {path}: set a .parquet, .json(l)(.gz), .csv or .txt file, or a folder of them")
    if saved_dataset := _saved_dataset(path, split, named):
        return _check_readable(path, saved_dataset)
    files = {p: p.relative_to(path) for p in sorted(below(path)) if is_data(p, path)}
    if not files:
        raise UserError(
            f"no dataset at {path}: it holds no file of text, the formats are {', '.join(FORMATS)} (metadata such as "
            "dataset_info.json or README.txt is skipped), and no class folders of images"
        )
    chosen = _files_of_split(path, files, split, named)
    forms = {form_of(p): p.name for p in chosen}
    if len(forms) > 1:
        raise UserError(
            f"{path} holds files of several formats ({', '.join(sorted(forms.values()))}): set the path of one file, or "
            "put those of one format into their own folder"
        )
    return _check_readable(path, SplitFiles(next(iter(forms)), tuple(chosen)))


def form_of(path: Path) -> str | None:
    """A value of FORMATS by the file's suffix, ignoring a compression suffix; None if it is not text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSED
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    form = FORMATS.get(suffix[0]) if suffix else None
    return None if packed and form in ("parquet", "arrow") else form


def _single_file(path: Path, split: str, named: bool) -> SplitFiles:
    form = form_of(path)
    if form is None:
        packed = path.suffix.lower() in COMPRESSED
        hint = f" (a compressed file must name its format, such as {path.stem}.jsonl{path.suffix})" if packed else ""
        raise UserError(f"cannot read {path}: the formats are {', '.join(FORMATS)}{hint}")
    by_path = _split_of(Path(path.name))
    if named and split != by_path.name and SPLITS.get(split, split) != by_path.standard:
        raise NoSplit(f"{path} is a single file without a split '{split}': leave out @{split}", [])
    return SplitFiles(form, (path,))


def _saved_dataset(folder: Path, split: str, named: bool) -> SplitFiles | None:
    """The files that `save_to_disk` wrote: one data set, or a folder per split. None if there are none."""
    if (folder / "dataset_dict.json").is_file():
        try:
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'dataset_dict.json'} is damaged: it does not list the splits") from error
        if split not in splits:
            raise _missing_split(folder, split, splits)
        folder = folder / split
    elif not (folder / "state.json").is_file() or not any(folder.glob("*.arrow")):
        return None
    elif named and _state(folder).get("_split") != split:
        raise _missing_split(folder, split, [name] if (name := _state(folder).get("_split")) else [])
    paths = tuple(sorted(folder.glob("*.arrow")))
    if not paths:
        raise UserError(f"{folder} holds no .arrow file: save_to_disk did not finish, so save it again")
    # `datasets` also writes its caches there, cache-*.arrow, when someone maps or filters the rows
    rows = [file["filename"] for file in _state(folder).get("_data_files", ()) if "filename" in file]
    return SplitFiles(SAVED, tuple(path for path in paths if path.name in rows) or paths)


def _state(folder: Path) -> dict[str, Any]:
    return read_json(folder / "state.json") or {}


def below(folder: Path) -> Iterator[Path]:
    """The files in a folder, at any depth, in a fixed order; also those in folders that are symbolic links."""
    seen = set()  # a link may lead back up
    for where, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(where)
        folders[:] = [] if place in seen else sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where, name) for name in sorted(names) if place not in seen)
        seen.add(place)


def is_data(path: Path, root: Path) -> bool:
    """Whether a file in the folder `root` holds rows of a data set, rather than describes it."""
    if any(part.startswith(".") for part in path.relative_to(root).parts) or not path.is_file():
        return False
    form = form_of(path)
    metadata = METADATA.get(form) if path.suffix.lower() not in (".jsonl", ".ndjson") else None
    return form is not None and not (metadata and metadata.fullmatch(path.name.partition(".")[0]))


def _files_of_split(folder: Path, files: dict[Path, Path], split: str, named: bool) -> list[Path]:
    """The `files` of the split; all of them if no file names a split and the user named none."""
    by_path = {path: _split_of(relative) for path, relative in files.items()}
    # among texts without split names, "my-train-trip.txt" means no split
    if not all(found.standard for found in by_path.values()):
        by_path = {path: found if found.certain else SplitName() for path, found in by_path.items()}
    wanted = SPLITS.get(split, split)
    chosen = [path for path, found in by_path.items() if split == found.name or wanted == found.standard]
    splits = sorted({found.standard or found.name for found in by_path.values() if found.name})
    meaningless = len(splits) == 1 and not set(re.split(r"[-._ \d]+", splits[0])) & SPLITS.keys()  # part-00000-of-00010
    if not chosen and (named or (splits and not meaningless)):
        raise _missing_split(folder, split, splits)
    by_name = [path for path in chosen if (own := _split_of(Path(path.name))).standard or own.name == split]
    places = sorted({str(files[path].parent) for path in by_name})
    if "default" in places:
        return [path for path in chosen if str(files[path].parent) == "default"]
    if len(places) > 1:
        raise UserError(
            f"{folder} has configurations {', '.join(places)}: name one of them, such as {folder}:{places[-1]}"
        )
    return chosen or list(files)


def _missing_split(folder: Path, split: str, splits: list[str]) -> NoSplit:
    existing = (
        f"the splits there are {', '.join(splits)}" if splits else f"its files name no split, so leave out @{split}"
    )
    return NoSplit(f"{folder} has no split '{split}': {existing}", splits)


def _split_of(path: Path) -> SplitName:
    """`c4-train.00000-of-01024.json.gz` is train. Shards of `train_sft` are a split of that name, not train, as on the hub.
    `my_train.jsonl` is train if all files have such names, since the names then tell the splits apart."""
    stem = path.name
    for suffix in reversed(path.suffixes):
        if suffix.lower() in (*FORMATS, *COMPRESSED):
            stem = stem.removesuffix(suffix)
    shard = SHARD.fullmatch(stem)
    name = shard[1] if shard else re.sub(r"[-._ ]*\d+$", "", stem)
    words = re.split(r"[-. ]+" if shard else r"[-._ \d]+", name.lower())
    standard = next((SPLITS[word] for word in words if word in SPLITS), None)
    if standard:
        return SplitName(name, standard, bool(shard) or name.lower() in SPLITS)
    if above := next((part for part in reversed(path.parts[:-1]) if part.lower() in SPLITS), None):
        return SplitName(above, SPLITS[above.lower()], True)
    return SplitName(name, None, True) if shard else SplitName()


def _check_readable(where: Path, found: SplitFiles) -> SplitFiles:
    if not any(path.stat().st_size for path in found.paths):
        raise UserError(f"{where} is empty")
    for path in found.paths:
        with open(path, "rb") as file:
            if file.read(len(LFS)) == LFS:
                raise UserError(f"{path} is a git-lfs pointer, not text: run git lfs pull in its folder")
    return found
