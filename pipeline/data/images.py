"""Samples of images: pixel values as the model's image processor makes them, read when they are used.

Shapes: B = images of a batch, C = channels, H, W = pixels.
"""

import functools
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedConfig

from pipeline.data import augmentation
from pipeline.data.image_rows import ImageRows
from pipeline.data.sources import Source
from pipeline.runtime.errors import UserError

KEPT = 256 << 20  # bytes of pixel values that are kept for images that come again
WORDNET = re.compile(r"n\d{8}")  # the class folders of ImageNet


class Images(Dataset):
    """Images of a source in the order of `places`. An item is its pixel values (C, H, W), a slice a batch (B, C, H, W);
    with `labels`, the class of each row, each comes with its label: [pixels, label]. With `augment`, a seed, each item is
    augmented by its index."""

    def __init__(
        self,
        rows: ImageRows,
        processor: Any,
        config: PreTrainedConfig,
        places: Sequence[int],
        labels: Sequence[int] | None,
        augment: int | None = None,
    ) -> None:
        self.rows, self.processor, self.places, self.labels = rows, processor, places, labels
        self.augment = augment
        self.channels = getattr(config, "num_channels", 3)
        self._kept: dict[int, Tensor] = {}
        self._free = KEPT

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, int):
            pixels_CHW = self._item(index)
            return pixels_CHW if self.labels is None else [pixels_CHW, self.labels[self.places[index]]]
        places = self.places[index]
        try:
            pixels_BCHW = torch.stack([self._item(number) for number in range(len(self))[index]])
        except RuntimeError as error:
            raise UserError(
                f"the image processor leaves the images of {self.rows.source} in different sizes: set do_resize and size in "
                "its preprocessor_config.json"
            ) from error
        if self.labels is None:
            return pixels_BCHW
        return [pixels_BCHW, torch.tensor([self.labels[place] for place in places])]

    def _item(self, number: int) -> Tensor:
        place = self.places[number]
        if self.augment is None:
            return self._pixels(place)
        resample = getattr(self.processor, "resample", None)
        resample = Image.Resampling.BICUBIC if resample is None else resample
        image, size = self.rows.image(place, self.channels), self._size
        return self._processed(augmentation.augmented(image, size, resample, self.augment, number), place, resized=True)

    def _pixels(self, place: int) -> Tensor:
        if place not in self._kept:
            pixels_CHW = self._processed(self.rows.image(place, self.channels), place)
            if self._free < pixels_CHW.nbytes:
                return pixels_CHW
            self._free -= pixels_CHW.nbytes
            self._kept[place] = pixels_CHW
        return self._kept[place]

    @functools.cached_property
    def _size(self) -> tuple[int, int]:
        """(W, H) that the processor gives images."""
        height, width = self._pixels(self.places[0]).shape[-2:]
        return width, height

    def _processed(self, image: Image.Image, place: int, resized: bool = False) -> Tensor:
        """(C, H, W). `resized`: the image has the model's size, so that the processor must not crop it again."""
        try:
            if resized and hasattr(self.processor, "val_transforms"):  # timm's processor has no such arguments
                steps = [
                    step for step in self.processor.val_transforms.transforms if "Resize" not in type(step).__name__
                ]
                return functools.reduce(lambda found, step: step(found), steps, image)
            whole = {"do_resize": False, "do_center_crop": False} if resized else {}
            found = self.processor(images=image, return_tensors="pt", **whole)
        except Exception as error:  # depends on the processor and its settings
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.rows.name(place)}: the model's image processor fails: {reason}") from error
        if more := found.keys() - {"pixel_values"}:
            raise UserError(
                f"the model reads {', '.join(sorted(more))} in addition to pixel values: this is not supported"
            )
        return found["pixel_values"][0]


def drawn(
    source: Source, processor: Any, config: PreTrainedConfig, count: int, seed: int, section: str = "calibration"
) -> Images:
    """`count` different images without labels, drawn with `seed`. Raises `UserError` if there are fewer."""
    rows = ImageRows(source, labelled=False)
    if count > len(rows):
        raise UserError(f"{source} has {len(rows)} images, but {count} are needed: set {section}.samples={len(rows)}")
    return Images(rows, processor, config, random.Random(seed).sample(range(len(rows)), count), None)


def repeated(
    source: Source, processor: Any, config: PreTrainedConfig, count: int, seed: int, augment: bool = False
) -> Images:
    """`count` images with labels: all of them in a new order each time, as often as needed; augmented by `seed` and index."""
    rows, draw = ImageRows(source, labelled=True), random.Random(seed)
    order, places = list(range(len(rows))), []
    while len(places) < count:
        draw.shuffle(order)
        places += order
    return Images(rows, processor, config, places[:count], labels(rows, config), seed if augment else None)


def evaluated(source: Source, processor: Any, config: PreTrainedConfig, limit: int | None) -> Images:
    """All images with labels, or `limit` of them, spread evenly: a split may be sorted by class."""
    rows = ImageRows(source, labelled=True)
    count = min(limit or len(rows), len(rows))
    places = [i * len(rows) // count for i in range(count)]
    return Images(rows, processor, config, places, labels(rows, config))


def labels(rows: ImageRows, config: PreTrainedConfig) -> list[int]:
    """The model's class of each row. Raises `UserError` unless the classes of the data set certainly are the model's."""
    numbers = _of_classes(rows, config)
    if numbers is not None:
        return [numbers[label] for label in rows.labels]
    if strange := [label for label in rows.labels if not 0 <= label < config.num_labels]:
        raise UserError(f"{rows.source} has the class {strange[0]}, but the model's are 0 to {config.num_labels - 1}")
    return list(rows.labels)


def _of_classes(rows: ImageRows, config: PreTrainedConfig) -> list[int] | None:
    """The model's number of each class of a data set, by name; None where the data set has numbers only."""
    classes, count, own = rows.classes, config.num_labels, dict(config.id2label)
    if classes is None:
        return None
    same_order = list(range(count))
    if all(re.fullmatch(r"LABEL_\d+", str(name)) for name in own.values()):  # the model's classes have no names
        if len(classes) != count:
            raise UserError(
                f"{rows.source} has {len(classes)} classes, but the model has {count}: they must be the same"
            )
        if rows.by_name and (other := [one for one, two in zip(classes, sorted(classes, key=_natural)) if one != two]):
            raise UserError(
                f"the order of the classes of {rows.source} is not certain: torchvision and timm sort '{other[0]}' "
                "differently, and the model's classes have no names: set id2label in its config.json"
            )
        return same_order
    # ImageNet has two classes called crane, so that names alone would not do. A name in another place shows another order
    differ, times = [name for number, name in enumerate(classes) if name != own.get(number)], Counter(own.values())
    agree = len(differ) <= 0.1 * count and not any(times[name] == 1 for name in differ)
    if len(classes) == count and (agree or (count == 1000 and all(map(WORDNET.fullmatch, classes)))):
        return same_order
    by_name = {str(name): number for number, name in own.items()}
    if unknown := [name for name in classes if name not in by_name]:
        raise UserError(
            f"{rows.source} has the class '{unknown[0]}', which the model does not know ({len(unknown)} of {len(classes)} "
            f"such): its classes are {', '.join(list(by_name)[:3])}, ... (id2label in config.json)"
        )
    return [by_name[name] for name in classes]


def _natural(name: str) -> list[str | int]:
    """timm's order: numbers by their value, and without regard to case."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]
