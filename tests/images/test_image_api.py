"""The API on an image classifier in memory equals the command."""

import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from transformers import AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import pipeline.api as espalier
from pipeline.runtime.errors import UserError
from tests.conftest import typing
from tests.images import test_pointwise
from tests.images.classifiers import picture, pixels, tiny
from tests.images.test_image_runs import SHORT, models

pytestmark = pytest.mark.slow


@pytest.fixture
def ran(monkeypatch, capsys, tmp_path):
    command = typing((*SHORT, "pretrain.steps=5", "prune.sparsity=0.7"), monkeypatch, capsys)
    code, _, lines = command("finetune.max_steps=3", f"run_dir={tmp_path}/run")
    assert code == 0, lines
    return tmp_path / "run"


def test_prune_finetune_and_evaluate_equal_the_command(ran):
    model = AutoModelForImageClassification.from_pretrained(ran / "pretrain/model")
    masks = espalier.prune(model, sparsity=0.7, calibration="digits", samples=256, batch_size=64)
    loaded = espalier.Masks.load(ran / "prune/masks.safetensors")
    assert set(masks) == set(loaded) and all(torch.equal(masks[name], loaded[name]) for name in masks)
    rows = espalier.finetune(
        model, masks, "digits", method="full", max_steps=3, batch_size=64, lr=1e-3, augment=True, label_smoothing=0.1
    )
    assert len(rows) == 3
    theirs = AutoModelForImageClassification.from_pretrained(ran / "finetune/model").state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in model.state_dict().items())
    found = espalier.evaluate(model, accuracy=["digits"], batch_size=64)
    assert found["accuracy"] == models(ran)["finetuned"]["accuracy"]
    espalier.verify(model, masks)


def test_pixel_values_and_data_sets_in_memory():
    model, dense = tiny("ViT"), tiny("ViT")
    masks = espalier.prune(model, calibration=pixels(8), batch_size=2)
    rows = espalier.reconstruct(
        model, masks, dense, calibration=pixels(8), batch_size=1, accumulate=2, epochs=2, lr=1e-3
    )
    assert len(rows) == 2
    kinds = Features({"image": ImageFeature(), "label": Dataset.from_dict({"label": [0]}).features["label"]})
    rows = Dataset.from_dict({"image": [picture(level) for level in (20, 90, 200)], "label": [0, 1, 2]}, kinds)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    espalier.finetune(model, masks, rows, processor, max_steps=2, batch_size=3)
    assert "images" in espalier.evaluate(model, processor, accuracy=[rows])["accuracy"]
    espalier.verify(model, masks)


def test_convolutions_are_recovered_in_a_model_that_was_loaded_again():
    dense, pruned = test_pointwise.tiny("ResNet"), test_pointwise.tiny("ResNet")
    chosen = {"calibration": pixels(8), "sparsity": 0.5}
    masks = espalier.prune(pruned, pointwise=True, **chosen)
    with pytest.raises(UserError, match="set pointwise=true"):
        espalier.prune(pruned, **chosen)  # the first call left no marks
    again = test_pointwise.tiny("ResNet")
    again.load_state_dict(pruned.state_dict())
    assert espalier.reconstruct(again, masks, dense, calibration=pixels(8), accumulate=2, epochs=1, lr=1e-4)
    kinds = Features({"image": ImageFeature(), "label": Dataset.from_dict({"label": [0]}).features["label"]})
    rows = Dataset.from_dict({"image": [picture(level) for level in (20, 90, 200)], "label": [0, 1, 2]}, kinds)
    espalier.finetune(again, masks, rows, ViTImageProcessorPil(size={"height": 32, "width": 32}), max_steps=1, lr=1e-2)
    assert not torch.equal(again.state_dict()[next(iter(masks))], pruned.state_dict()[next(iter(masks))])
    espalier.verify(again, masks)


def test_what_does_not_fit_is_refused():
    model = tiny("ViT")
    with pytest.raises(UserError, match=r"pixel values of \(images, 3, height, width\) are needed"):
        espalier.prune(model, calibration=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(UserError, match="there is no image processor where the model was loaded from"):
        espalier.prune(model, calibration="digits", samples=8)
    with pytest.raises(UserError, match="reads images: set accuracy="):
        espalier.evaluate(model, perplexity=["world"])
    with pytest.raises(UserError, match="nothing to evaluate: set accuracy="):
        espalier.evaluate(model)
    for wrong in ({"batch_size": -1}, {"limit": 0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}=.* is out of range"):
            espalier.evaluate(model, accuracy=["digits"], **wrong)
    with pytest.raises(UserError, match="calibration is a list: a datasets.Dataset"):
        espalier.prune(model, calibration=["text"])
