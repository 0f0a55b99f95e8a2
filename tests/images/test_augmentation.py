"""Augmentation: crops and flips depend on the seed and the sample's place alone, and have the model's size."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from pipeline.data import augmentation, images, sources
from pipeline.settings import reader
from tests.images.test_image_data import CONFIG, NAMES, PROCESSOR

# it resizes to 18 pixels and crops the middle 16, which an augmented image must not lose
CROPPING = ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=16 / 18)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> sources.Source:
    """Three noisy images of 50 x 40 pixels."""
    root, noise = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for name in NAMES:
        (root / name).mkdir()
        Image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / name / "0.png")
    return sources.source(str(root))


@pytest.mark.parametrize("processor", [PROCESSOR, CROPPING], ids=["whole", "cropping"])
def test_a_sample_is_the_normalised_crop_of_its_number(source, processor):
    seen = images.repeated(source, processor, CONFIG, 12, seed=5, augment=True)
    for number in range(12):
        draw = random.Random(f"5 {number}")
        image = seen.rows.image(seen.places[number], 3)
        image = image.crop(augmentation.crop(50, 40, draw)).resize((16, 16), processor.resample)
        image = ImageOps.mirror(image) if draw.random() < 0.5 else image
        levels = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        torch.testing.assert_close(seen[number][0], (levels - mean) / std, atol=1e-5, rtol=1e-5)


def test_the_same_sample_has_the_same_pixels_in_any_order(source):
    seen, again = (images.repeated(source, PROCESSOR, CONFIG, 12, seed=5, augment=True) for _ in range(2))
    backwards = {number: again[number] for number in reversed(range(12))}
    batch, labels = seen[3:9]
    for number in range(12):
        assert torch.equal(seen[number][0], backwards[number][0]) and seen[number][1] == backwards[number][1]
    assert all(torch.equal(batch[i], backwards[3 + i][0]) and labels[i] == backwards[3 + i][1] for i in range(6))
    first = [number for number in range(12) if seen.places[number] == seen.places[0]]
    assert len({seen[number][0].numpy().tobytes() for number in first}) == len(first) == 4  # each time another crop
    other = images.repeated(source, PROCESSOR, CONFIG, 12, seed=6, augment=True)
    assert not torch.equal(other[0][0], seen[0][0])
    assert images.repeated(source, PROCESSOR, CONFIG, 12, seed=5)[0][1] == seen[0][1]


def test_crops_have_the_usual_areas_and_ratios():
    draw, shares, ratios = random.Random(0), [], []
    for _ in range(2000):
        left, top, right, bottom = augmentation.crop(400, 300, draw)
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        shares.append((right - left) * (bottom - top) / (400 * 300))
        ratios.append((right - left) / (bottom - top))
    assert 0.075 < min(shares) < 0.1 and 0.9 < max(shares) <= 1
    assert 0.74 < min(ratios) < 0.78 and 1.28 < max(ratios) < 1.35
    assert augmentation.crop(1000, 30, draw) == (480, 0, 520, 30) and augmentation.crop(30, 1000, draw) == (
        0,
        480,
        30,
        520,
    )
    assert augmentation.crop(1, 1, draw) == (0, 0, 1, 1)


def test_half_of_the_samples_are_flipped():
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))  # brighter to the right
    made = [np.asarray(augmentation.augmented(image, (8, 8), Image.Resampling.BILINEAR, 0, i)) for i in range(400)]
    flipped = sum(bool(levels[0, 0] > levels[0, -1]) for levels in made)
    assert 160 < flipped < 240


def test_processors_of_timm_augment_too(source):
    pytest.importorskip("timm")
    from transformers.models.timm_wrapper import image_processing_timm_wrapper as timm_processor

    processor = timm_processor.TimmWrapperImageProcessor({"input_size": [3, 16, 16], "crop_pct": 0.5})
    seen = images.repeated(source, processor, CONFIG, 1, seed=5, augment=True)
    draw = random.Random("5 0")
    image = seen.rows.image(seen.places[0], 3)
    image = image.crop(augmentation.crop(50, 40, draw)).resize((16, 16), Image.Resampling.BICUBIC)
    image = ImageOps.mirror(image) if draw.random() < 0.5 else image
    levels = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(processor.data_config[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(seen[0][0], (levels - mean) / std, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit_base", "vit_large", "deit_base", "convnext_base", "swin_base", "mixer_b16"])
def test_the_recipes_of_imagenet_models_augment_and_digits_do_not(name):
    assert reader.load([f"recipe={name}_2of4"]).finetune.augment
    assert not reader.load(["recipe=tiny_vision"]).finetune.augment
