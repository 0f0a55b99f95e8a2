"""Finds the images of a split in a folder with one folder for each class, as torchvision and timm read it.

FOLDER/[SPLIT/]CLASS/.../IMAGE
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.text_files import SPLITS, NoSplit, below, is_data
from pipeline.runtime import files
from pipeline.runtime.errors import UserError

IMAGES = "images"  # the form of such a folder
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def find(folder: Path, split: str, named: bool = False) -> list[Path] | None:
    """The images of `split`, sorted by class and name; None if the folder is of another kind. `named`: the user named the
    split, so a folder without splits does not count. Raises `UserError` if the layout is wrong or the split is missing."""
    if not folder.is_dir() or _holds_text(folder) or not any(_images(folder)):
        return None
    splits = {
        SPLITS[sub.name.lower()]: sub for sub in _folders(folder) if sub.name.lower() in SPLITS and any(_folders(sub))
    }
    wanted = SPLITS.get(split, split)
    if splits and wanted not in splits:
        raise NoSplit(f"{folder} has no split '{split}': the splits there are {', '.join(splits)}", list(splits))
    if not splits and named:
        raise NoSplit(f"{folder} has no split '{split}': its folders name no split, so leave out @{split}", [])
    base = splits.get(wanted, folder)
    if loose := next((path for path in base.iterdir() if path.suffix.lower() in SUFFIXES), None):
        raise UserError(f"{loose} is in no class folder: put the images of each class into {base}/CLASS")
    found = {sub.name: list(_images(sub)) for sub in sorted(_folders(base))}
    if empty := [name for name, images in found.items() if not images]:
        raise UserError(f"{base / empty[0]} holds no image: remove the folder, or put the images of the class into it")
    if len(found) < 2:
        raise UserError(
            f"{base} has {len(found)} class folders, and a classifier needs two or more: {base}/CLASS/IMAGE"
        )
    return [path for images in found.values() for path in images]


def classes(paths: Sequence[str]) -> list[str]:
    """The class of each image: the folder below the common parent of all paths. `find` returns at least two classes."""
    base = os.path.commonpath(paths)
    return [Path(path).relative_to(base).parts[0] for path in paths]


def identity(paths: Sequence[str]) -> str:
    """Changes with the images, by name, size and time: reading ImageNet would take an hour."""
    stats = ((path, os.stat(path)) for path in paths)
    return files.digest([[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats])


def _holds_text(folder: Path) -> bool:
    return any(is_data(path, folder) for path in folder.iterdir())


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> Iterator[Path]:
    return (path for path in below(folder) if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
