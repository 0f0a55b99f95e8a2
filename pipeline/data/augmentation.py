"""Random resized crops and horizontal flips of training images, by Pillow. Pure: a seed and a number decide."""

import math
import random

from PIL import Image

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a crop, as usual for ImageNet (Szegedy et al. 2014, section 6)
ATTEMPTS = 10


def augmented(image: Image.Image, size: tuple[int, int], resample: int, seed: int, number: int) -> Image.Image:
    """A random crop of the image, resized to `size` (width, height), and flipped in half of the cases. `number`: the place of
    the sample in the training, so that neither resuming nor the number of processes changes it."""
    draw = random.Random(f"{seed} {number}")
    found = image.crop(crop(*image.size, draw)).resize(size, resample)
    return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else found


def crop(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop with a random share of the area and a random aspect ratio. If none fits in several
    attempts, as in very long images, it is the largest in the centre with an allowed ratio."""
    for _ in range(ATTEMPTS):
        area, ratio = width * height * draw.uniform(*AREA), math.exp(draw.uniform(*map(math.log, RATIO)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = draw.randint(0, width - across), draw.randint(0, height - down)
            return left, top, left + across, top + down
    across, down = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
