"""The handwritten digits of scikit-learn: 1,797 real images that come with the package, for the toy recipe of images."""

import functools

from pipeline.runtime.errors import UserError

NAME = "digits"
CLASSES = [str(digit) for digit in range(10)]
SIZE = 8  # pixels, in height and width
HELD_OUT = 5  # every fifth image is for the test


@functools.lru_cache
def images(split: str) -> list[tuple]:
    """(8 x 8 grey levels of 0..255, the digit) of each image of `train` (1,437) or `test` (360), in scikit-learn's order.

    Neighbouring images may be by the same writer, so that the test is easier than with new writers. Raises `UserError` for an
    unknown split.
    """
    from sklearn.datasets import load_digits

    if split not in ("train", "test"):
        raise UserError(f"the digits have no split '{split}': use digits@train or digits@test")
    found = load_digits()
    levels = (found.images * (255 / 16)).round().astype("uint8")  # stored as 0..16
    pairs = zip(levels, map(int, found.target))
    return [pair for place, pair in enumerate(pairs) if (place % HELD_OUT == 0) == (split == "test")]
