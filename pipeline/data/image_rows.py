"""Reads the images of a source one at a time, and their classes.

Pillow reads them, with or without torchvision. Grey images, palettes and transparency become what the model reads: three
channels, or one.
"""

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from pipeline.data import digits, image_files, text_rows
from pipeline.data.sources import GENERATED, Source
from pipeline.runtime.errors import UserError

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target")


class ImageRows:
    """The images of a source. `labels` are numbers of classes; `classes` are their names, None where a source has none, in the
    order of the names (`by_name`) where a source gives no numbers.

    Raises `UserError` if a source holds no images, or no labels where they are `labelled`.
    """

    def __init__(self, source: Source, labelled: bool) -> None:
        self.source = source
        self.labels: Sequence[int] = ()
        self.classes: list[str] | None = None
        self.by_name = False
        if source.form == image_files.IMAGES:
            names = image_files.classes(source.files)
            self._set(names)
            self.images: Sequence[Any] = source.files
        elif source.name == digits.NAME:
            pairs = digits.images(source.split)
            self.classes, self.labels = digits.CLASSES, [label for _, label in pairs]
            self.images = [levels for levels, _ in pairs]
        elif source.name in GENERATED:
            raise UserError(f"{source.name} holds text, not images: set {source.section} to a data set of images")
        else:
            rows = text_rows.loaded(source)
            column = _image_column(source, rows)
            if labelled:
                self._read_labels(rows)
            self.images = rows.select_columns([column]).cast_column(column, ImageFeature(decode=False))[column]
        if not len(self.images):
            raise UserError(f"{source} holds no images")

    def __len__(self) -> int:
        return len(self.images)

    def name(self, place: int) -> str:
        """An image, for messages."""
        stored = self.images[place]
        path = stored if isinstance(stored, str) else stored.get("path") if isinstance(stored, dict) else None
        return str(path) if path and self.source.form == image_files.IMAGES else f"image {place} of {self.source}"

    def image(self, place: int, channels: int) -> Image.Image:
        """An image with 8 bits for each of three channels, or of one. Raises `UserError`, which names it, if it is damaged."""
        stored = self.images[place]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata
                found = Image.fromarray(stored) if isinstance(stored, np.ndarray) else Image.open(_file(stored))
                found.load()
                found = ImageOps.exif_transpose(found)
                return _eight_bits(found).convert("RGB" if channels == 3 else "L")
        except UserError as error:
            raise UserError(f"{self.name(place)} {error}") from None
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
            reason = re.sub(r"<[^>]*>", "", str(error)).strip() or type(error).__name__
            raise UserError(f"{self.name(place)} is damaged or no image: {reason}") from error

    def _set(self, names: Sequence[str]) -> None:
        self.classes, self.by_name = sorted(set(names)), True
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = [numbers[name] for name in names]

    def _read_labels(self, rows: Dataset) -> None:
        kinds = rows.features
        columns = [name for name in LABEL_COLUMNS if name in kinds]
        columns += [name for name, kind in kinds.items() if isinstance(kind, ClassLabel) and name not in columns]
        if not columns:
            raise UserError(
                f"{self.source} has no column with the class of each image: it has {', '.join(kinds)}; name it "
                f"{LABEL_COLUMNS[0]}"
            )
        values, kind = list(rows[columns[0]]), kinds[columns[0]]
        if strange := [
            value for value in values if not isinstance(value, int | str) or type(value) is not type(values[0])
        ]:
            raise UserError(
                f"column {columns[0]} of {self.source} holds {strange[0]!r}: numbers, or names, of classes are needed"
            )
        if values and isinstance(values[0], str):
            return self._set(values)
        self.labels = list(map(int, values))  # a bool is no class for torch
        self.classes = list(kind.names) if isinstance(kind, ClassLabel) else None
        if self.classes and (strange := [value for value in values if not 0 <= value < len(self.classes)]):
            raise UserError(f"{self.source} has images of no class (label {strange[0]}): set another split")


def _image_column(source: Source, rows: Dataset) -> str:
    chosen = [columns[0] for columns in source.columns] if len(source.columns) == 1 else []
    found = [name for name, kind in rows.features.items() if isinstance(kind, ImageFeature)]
    for name in chosen or (*found, *IMAGE_COLUMNS):
        if name in rows.features:
            return name
    raise UserError(
        f"{source} has no column {chosen[0] if chosen else IMAGE_COLUMNS[0]} with images: it has {', '.join(rows.features)}; "
        f"set {source.section}.column, or a folder with a folder of images for each class"
    )


def _file(stored: Any) -> Any:
    if isinstance(stored, str):
        return stored
    if stored is None:
        raise UserError("is missing")
    return io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else Path(stored["path"])


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow would clip 16 bits to 8, which makes almost everything white."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda level: level / 257).convert("L")
    if image.mode in ("I", "F"):
        raise UserError(f"has pixels of 32 bits (mode {image.mode}), of unknown range: store them with 8 or 16 bits")
    return image
