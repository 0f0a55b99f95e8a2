"""Owns which files of a folder hold the text of a split: one table of rules for forms, metadata, splits, configurations.

The rules are those of the hub and of `datasets` (huggingface.co/docs/hub/datasets-file-names-and-splits), but that what is
ambiguous is refused: a split that is not there, several configurations, files of several forms.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from pipeline.runtime.errors import UserError

FORMATS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "text",
    ".csv": "csv",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # around a text form, as in .jsonl.gz
SAVED = "saved"  # the form of a folder that `save_to_disk` of datasets wrote

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHARD = re.compile(r"(.+?)[-._]\d+-of-\d+.*")  # train-00000-of-00001, c4-train.00000-of-01024
# files that describe a data set, by their names up to the first dot
METADATA = {
    "json": re.compile(
        r"dataset_infos?|dataset_dict|state|meta|metadata|info|stats|statistics|config|index|manifest|croissant", re.I
    ),
    "text": re.compile(r"read_?me|licen[sc]e|requirements", re.I),
}
LFS = b"version https://git-lfs"


class Found(NamedTuple):
    """The files of a split, in the order in which they are read, and their form, a value of FORMATS or SAVED."""

    form: str
    paths: tuple[Path, ...]


class Told(NamedTuple):
    """What a file's name, or a folder above it, tells of its split: its name as it is spelt there, the usual split that this
    means, and whether it surely is one."""

    own: str | None = None
    usual: str | None = None
    sure: bool = False


class NoSplit(UserError):
    """`splits`: those that are there."""

    def __init__(self, text: str, splits: list[str]) -> None:
        super().__init__(text)
        self.splits = splits


def find(path: Path, split: str, config: str | None = None, named: bool = False) -> Found:
    """The files of `split` at `path`, a file or a folder.

    `config` is a folder below it. `named`: the split was asked for by name, so files that name none are not meant; else
    they are all read. A `UserError` says what is missing or ambiguous.
    """
    if config and path.is_dir():
        folders = [folder for folder in (path / config, path / "data" / config) if folder.is_dir()]
        if not folders:
            there = sorted(p.name for p in path.glob("*/") if p.is_dir() and not p.name.startswith("."))
            raise UserError(
                f"{path} has no configuration '{config}'" + (f": it has {', '.join(there)}" if there else "")
            )
        path = folders[0]
    if path.is_file():
        return _checked(path, _single(path, split, named))
    if not path.is_dir():
        raise UserError(
            f"no dataset at {path}: a .parquet, .json(l)(.gz), .csv or .txt file, or a folder of them, is needed"
        )
    if saved := _saved(path, split, named):
        return _checked(path, saved)
    files = {p: p.relative_to(path) for p in sorted(path.glob("**/*")) if _is_data(p, path)}
    if not files:
        raise UserError(
            f"no dataset at {path}: it holds no file of text, the formats are {', '.join(FORMATS)} (metadata such as "
            "dataset_info.json or README.txt is left out)"
        )
    chosen = _of_split(path, files, split, named)
    forms = {form_of(p): p.name for p in chosen}
    if len(forms) > 1:
        raise UserError(
            f"{path} holds files of several forms ({', '.join(sorted(forms.values()))}): name the file that is meant, or "
            "put those of one form into a folder of their own"
        )
    return _checked(path, Found(next(iter(forms)), tuple(chosen)))


def form_of(path: Path) -> str | None:
    """A value of FORMATS, by the name's end, or by what stands before that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSED
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    form = FORMATS.get(suffix[0]) if suffix else None
    return None if packed and form in ("parquet", "arrow") else form


def _single(path: Path, split: str, named: bool) -> Found:
    form = form_of(path)
    if form is None:
        packed = path.suffix.lower() in COMPRESSED
        hint = (
            f" (of what is compressed, such as {path.stem}.jsonl{path.suffix}, the name must tell it)" if packed else ""
        )
        raise UserError(f"cannot read {path}: the formats are {', '.join(FORMATS)}{hint}")
    told = _split_of(Path(path.name))
    if named and split != told.own and SPLITS.get(split, split) != told.usual:
        raise NoSplit(f"{path} is one file, which has no split '{split}': leave out @{split}", [])
    return Found(form, (path,))


def _saved(folder: Path, split: str, named: bool) -> Found | None:
    """What `save_to_disk` left there: a data set, or a folder for each split."""
    if (folder / "dataset_dict.json").is_file():
        try:
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'dataset_dict.json'} is damaged: it should name the splits") from error
        if split not in splits:
            raise _no_split(folder, split, splits)
        folder = folder / split
    elif not (folder / "state.json").is_file() or not any(folder.glob("*.arrow")):
        return None
    elif named and _split_of_saved(folder) != split:
        raise _no_split(folder, split, [own] if (own := _split_of_saved(folder)) else [])
    paths = tuple(sorted(folder.glob("*.arrow")))
    if not paths:
        raise UserError(f"{folder} holds no .arrow file, so it is no whole folder of save_to_disk")
    return Found(SAVED, paths)


def _split_of_saved(folder: Path) -> str | None:
    try:
        return json.loads((folder / "state.json").read_text()).get("_split")
    except (ValueError, AttributeError):
        return None


def _is_data(path: Path, root: Path) -> bool:
    if any(part.startswith(".") for part in path.relative_to(root).parts) or not path.is_file():
        return False
    form = form_of(path)
    metadata = METADATA.get(form) if path.suffix.lower() not in (".jsonl", ".ndjson") else None
    return form is not None and not (metadata and metadata.fullmatch(path.name.partition(".")[0]))


def _of_split(folder: Path, files: dict[Path, Path], split: str, named: bool) -> list[Path]:
    """Those of `files` that belong to the split; all where no file names one and none was asked for by name."""
    told = {path: _split_of(relative) for path, relative in files.items()}
    if not all(it.usual for it in told.values()):  # "my-train-trip.txt" among other texts names no split
        told = {path: it if it.sure else Told() for path, it in told.items()}
    wanted = SPLITS.get(split, split)
    chosen = [path for path, it in told.items() if split == it.own or wanted == it.usual]
    splits = sorted({it.usual or it.own for it in told.values() if it.own})
    meaningless = len(splits) == 1 and not set(re.split(r"[-._ \d]+", splits[0])) & SPLITS.keys()  # part-00000-of-00010
    if not chosen and (named or (splits and not meaningless)):
        raise _no_split(folder, split, splits)
    by_name = [path for path in chosen if (it := _split_of(Path(path.name))).usual or it.own == split]
    places = sorted({str(files[path].parent) for path in by_name})
    if "default" in places:
        return [path for path in chosen if str(files[path].parent) == "default"]
    if len(places) > 1:
        raise UserError(
            f"{folder} has configurations {', '.join(places)}: name the one that is meant, such as {folder}:{places[-1]}"
        )
    return chosen or list(files)


def _no_split(folder: Path, split: str, splits: list[str]) -> NoSplit:
    there = f"the splits there are {', '.join(splits)}" if splits else f"its files name no split, so leave out @{split}"
    return NoSplit(f"{folder} has no split '{split}': {there}", splits)


def _split_of(path: Path) -> Told:
    """`c4-train.00000-of-01024.json.gz` is train; shards of `train_sft` are a split of that name and not train, as on the
    hub; `my_train.jsonl` is train where all files have such names, for then they tell one from the other."""
    stem = path.name
    for suffix in reversed(path.suffixes):
        if suffix.lower() in (*FORMATS, *COMPRESSED):
            stem = stem.removesuffix(suffix)
    shard = SHARD.fullmatch(stem)
    name = shard[1] if shard else re.sub(r"[-._ ]*\d+$", "", stem)
    words = re.split(r"[-. ]+" if shard else r"[-._ \d]+", name.lower())
    usual = next((SPLITS[word] for word in words if word in SPLITS), None)
    if usual:
        return Told(name, usual, bool(shard) or name.lower() in SPLITS)
    if above := next((part for part in reversed(path.parts[:-1]) if part.lower() in SPLITS), None):
        return Told(above, SPLITS[above.lower()], True)
    return Told(name, None, True) if shard else Told()


def _checked(where: Path, found: Found) -> Found:
    if not any(path.stat().st_size for path in found.paths):
        raise UserError(f"{where} is empty")
    for path in found.paths:
        with open(path, "rb") as file:
            if file.read(len(LFS)) == LFS:
                raise UserError(f"{path} is a pointer of git-lfs and no text: run git lfs pull in its folder")
    return found
