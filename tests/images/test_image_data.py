"""Images as data: folders and data sets are read alike, labels are the model's, and what is wrong is said in one line."""

import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline.data import digits, images, sources
from pipeline.data.image_rows import ImageRows
from pipeline.runtime.errors import UserError
from tests.images.classifiers import picture

NAMES = ("cat", "dog", "owl")
CONFIG = ViTConfig(id2label=dict(enumerate(reversed(NAMES))), image_size=16)  # in another order than the folders
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})
LEVELS = (20, 90, 160, 230)


def folders(root, suffix=".png", split=""):
    for place, name in enumerate(NAMES):
        (root / split / name).mkdir(parents=True)
        for i in range(2):
            picture(LEVELS[place] + i).save(root / split / name / f"{i}{suffix}")
    return root


def read(spec, mirror=None, config=CONFIG, **options):
    return images.evaluated(sources.source(str(spec), mirror, "test", **options), PROCESSOR, config, None)


def test_a_folder_a_parquet_and_a_mirror_give_the_same(tmp_path):
    folder = read(folders(tmp_path / "folder"))
    assert len(folder) == 6
    assert folder[:][1].tolist() == [2, 2, 1, 1, 0, 0]  # by name
    rows = {"image": [], "label": []}
    for place, path in enumerate(sorted((tmp_path / "folder").glob("*/*"))):
        rows["image"].append({"bytes": path.read_bytes(), "path": None})
        rows["label"].append(place // 2)
    kinds = Features({"image": ImageFeature(), "label": ClassLabel(names=list(NAMES))})
    mirrored = tmp_path / "mirror/org/pets/default"
    mirrored.mkdir(parents=True)
    Dataset.from_dict(rows, kinds).to_parquet(mirrored / "test-00000-of-00001.parquet")
    named = [NAMES[label] for label in rows["label"]]
    Dataset.from_dict({"img": rows["image"], "class": named}).to_parquet(tmp_path / "plain.parquet")
    others = [
        read("org/pets", tmp_path / "mirror"),
        read(tmp_path / "plain.parquet"),
        read(folders(tmp_path / "s", split="test")),
    ]
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(folder[:], other[:], strict=True))


def test_any_mode_is_read_as_the_eyes_see_it(tmp_path):
    """Grey, palettes, transparency and 16 bits give the same pixels as the RGB image."""
    grey = picture(60)
    sixteen = Image.fromarray(np.asarray(grey.convert("L")).astype("uint16") * 257)
    versions = [
        grey,
        grey.convert("L"),
        grey.convert("P", palette=Image.Palette.ADAPTIVE),
        grey.convert("RGBA"),
        grey.convert("LA"),
        sixteen,
    ]
    assert sixteen.mode == "I;16"
    folders(tmp_path)
    for i, image in enumerate(versions):
        image.save(tmp_path / f"owl/{i}.png")
    owls = read(tmp_path)[4:][0]
    assert len(owls) == len(versions)
    for owl in owls:
        torch.testing.assert_close(owl, owls[0], atol=0.02, rtol=0)


def test_training_repeats_all_images_in_new_orders(tmp_path):
    source = sources.source(str(folders(tmp_path)))
    seen = images.repeated(source, PROCESSOR, CONFIG, 15, seed=0)
    assert (
        sorted(seen.places[:6]) == sorted(seen.places[6:12]) == list(range(6)) and seen.places[:6] != seen.places[6:12]
    )
    pixels, label = seen[0]
    assert torch.equal(pixels, seen[:2][0][0]) and label == seen[:2][1][0]
    assert len(set(images.drawn(source, PROCESSOR, CONFIG, 5, seed=0).places)) == 5


def test_a_limit_is_spread_over_the_classes(tmp_path):
    source = sources.source(str(folders(tmp_path)), split="test")
    assert images.evaluated(source, PROCESSOR, CONFIG, 3)[:][1].tolist() == [2, 1, 0]


def test_the_digits_splits_do_not_overlap():
    train, test = (digits.images(split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert not {levels.tobytes() for levels, _ in train} & {levels.tobytes() for levels, _ in test}


def test_classes_without_names_are_numbers(tmp_path):
    rows = {"image": [{"bytes": png(level), "path": None} for level in LEVELS], "label": [0, 2, 1, 2]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet")[:][1].tolist() == rows["label"]
    with pytest.raises(UserError, match="has the class 2, but the model's are 0 to 1"):
        read(tmp_path / "data.parquet", config=ViTConfig(num_labels=2))


def test_classes_may_be_true_and_false(tmp_path):
    rows = {"image": [{"bytes": png(level), "path": None} for level in (0, 255)], "label": [False, True]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    labels_B = read(tmp_path / "data.parquet", config=ViTConfig(num_labels=2))[:][1]
    assert labels_B.dtype == torch.int64 and labels_B.tolist() == [0, 1]


def test_imagenet_folders_are_in_the_order_of_the_model(tmp_path):
    """Names of 1,000 synsets are sorted as the classes of ImageNet are."""
    for place in range(1000):
        (tmp_path / f"n{place:08d}").mkdir()
        (tmp_path / f"n{place:08d}/0.png").write_bytes(png(1))
    config = ViTConfig(id2label={i: f"thing {i}" for i in range(1000)})
    assert read(tmp_path, config=config).labels == list(range(1000))


def test_two_classes_in_another_order_are_matched_by_name(tmp_path):
    """Also where all others agree. Names that are not the model's may differ, as some of ImageNet do."""
    names = [f"thing {i:02d}" for i in range(20)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(1))
    swapped = [*names[:3], names[4], names[3], *names[5:]]
    assert read(tmp_path, config=ViTConfig(id2label=dict(enumerate(swapped)))).labels == [0, 1, 2, 4, 3, *range(5, 20)]
    others = ["fish", "fish", *names[2:]]
    assert read(tmp_path, config=ViTConfig(id2label=dict(enumerate(others)))).labels == list(range(20))


@pytest.mark.parametrize("names", [list(map(str, range(12))), ["apple", "Zebra"]])
def test_folders_without_a_certain_order_need_the_names_of_the_model(tmp_path, names):
    """torchvision sorts 0, 1, 10, 11, 2, ... and Zebra before apple; timm does not."""
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(1))
    with pytest.raises(UserError, match="the order of the classes .* is not certain: torchvision and timm sort '"):
        read(tmp_path, config=ViTConfig(num_labels=len(names)))
    found = read(tmp_path, config=ViTConfig(id2label=dict(enumerate(names))))
    assert [names[label] for label in found.labels] == sorted(names)


def png(level: int) -> bytes:
    file = io.BytesIO()
    picture(level).save(file, "PNG")
    return file.getvalue()


def loose(root):
    picture(1).save(root / "here.png")


def one_class(root):
    for name in NAMES[1:]:
        [path.unlink() for path in (root / name).glob("*")]
        (root / name).rmdir()


def empty_class(root):
    [path.unlink() for path in (root / "owl").glob("*")]


def empty(root):
    for name in NAMES:
        [path.unlink() for path in (root / name).glob("*")]


def truncated(root):
    path = root / "owl/1.png"
    path.write_bytes(path.read_bytes()[:-40])


def no_image(root):
    (root / "owl/1.png").write_text("hello")


def float_pixels(root):
    Image.fromarray(np.full((20, 20), 0.5, "float32")).save(root / "owl/2.tif")


def stranger(root):
    (root / "owl").rename(root / "cow")


BAD = {
    loose: "here.png is in no class folder: put the images of each class into",
    one_class: "has 1 class folders, and a classifier needs two or more",
    empty_class: "owl holds no image: remove the folder",
    empty: "no dataset at .*, and no class folders of images",
    truncated: r"owl/1.png is damaged or no image: ",
    no_image: r"owl/1.png is damaged or no image: cannot identify image file",
    float_pixels: r"owl/2.tif has pixels of 32 bits",
    stranger: r"has the class 'cow', which the model does not know \(1 of 3 such\): its classes are owl, dog, cat",
}


@pytest.mark.parametrize("harm", BAD, ids=lambda harm: harm.__name__)
def test_bad_folders_are_refused_in_one_line(tmp_path, harm):
    folders(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=BAD[harm]) as error:
        read(tmp_path)[:]
    assert "\n" not in str(error.value)


def test_a_model_without_names_needs_as_many_classes(tmp_path):
    with pytest.raises(UserError, match="has 3 classes, but the model has 4"):
        read(folders(tmp_path), config=ViTConfig(num_labels=4))


def test_processors_that_give_more_than_pixels_are_refused(tmp_path):
    def processor(images, return_tensors):
        return PROCESSOR(images=images, return_tensors=return_tensors) | {"spatial_shapes": torch.zeros(1)}

    source = sources.source(str(folders(tmp_path)))
    with pytest.raises(UserError, match="the model reads spatial_shapes in addition to pixel"):
        images.drawn(source, processor, CONFIG, 1, seed=0)[0]


def test_texts_and_labels_are_not_mistaken(tmp_path):
    with pytest.raises(UserError, match="world holds text, not images"):
        read("world")
    with pytest.raises(UserError, match="digits@test holds images, not text"):
        sources.documents(sources.source("digits", split="test"))
    Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="has no column image with images: it has text, label"):
        read(tmp_path / "t.parquet")
    kinds = Features({"image": ImageFeature(), "label": ClassLabel(names=list(NAMES))})
    Dataset.from_dict({"image": [{"bytes": png(1)}], "label": [-1]}, kinds).to_parquet(tmp_path / "u.parquet")
    with pytest.raises(UserError, match=r"has images of no class \(label -1\)"):
        read(tmp_path / "u.parquet")
    Dataset.from_dict({"image": [{"bytes": png(1)}]}, Features({"image": ImageFeature()})).to_parquet(
        tmp_path / "v.parquet"
    )
    with pytest.raises(UserError, match="has no column with the class of each image: it has image"):
        read(tmp_path / "v.parquet")
    assert len(ImageRows(sources.source(str(tmp_path / "v.parquet")), labelled=False)) == 1
