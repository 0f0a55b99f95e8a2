"""Runs of image classifiers: the recipe's figures, killed and resumed runs, several processes, LoRA, mistakes."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from pipeline.commands.main import main
from pipeline.compact.compact_model import load_compact
from pipeline.sparsity.masks import Masks
from tests import launches
from tests.conftest import QUICK, typing
from tests.images.classifiers import picture, pixels

SHORT = (
    *("recipe=tiny_vision", "pretrain.steps=60", "finetune.max_steps=20", "finetune.checkpoint_every=2"),
    *("finetune.augment=true", "finetune.label_smoothing=0.1"),
)


def weights(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*.safetensors")}


def models(run_dir: Path) -> dict[str, dict]:
    return json.loads((run_dir / "evaluate/results.json").read_text())["models"]


def run(folder: Path, *settings, of: int = 1) -> Path:
    launches.run((*SHORT, *settings, f"run_dir={folder}/run"), folder / "log", of)
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A short run of all stages."""
    return run(tmp_path_factory.mktemp("vision"))


@pytest.fixture
def again(whole, monkeypatch, capsys):
    """Runs the command on the model of `whole`, in this process."""
    stages = "stages=[prune,finetune,evaluate,report]"
    usual = (*SHORT, stages, f"model={whole}/pretrain/model", "calibration.samples=8", "finetune.max_steps=2")
    return typing(usual, monkeypatch, capsys)


@pytest.mark.slow
def test_the_recipe_loses_and_recovers_accuracy(tmp_path):
    seen = launches.run(("recipe=tiny_vision", f"run_dir={tmp_path}/run"), tmp_path / "log")
    found = models(tmp_path / "run")
    dense, pruned, finetuned = (found[name]["accuracy"]["digits"]["acc"] for name in ("dense", "pruned", "finetuned"))
    assert dense >= 0.95
    assert pruned < dense - 0.03 and found["pruned"]["differences"]["dense"]["accuracy"]["digits"]["acc"] < 0
    assert finetuned - pruned >= 0.8 * (dense - pruned)
    for name in ("pruned", "finetuned"):
        assert found[name]["mask_violations"] == 0 and found[name]["sparsity"]["overall"] == 0.5
    assert "digits, recovered" in seen and "digits, top 5" in seen
    report = (tmp_path / "run/report/report.md").read_text()
    assert "pipeline_tag: image-classification" in report and "of the lost accuracy was recovered" in report
    card = (tmp_path / "run/finetune/model/README.md").read_text()
    assert "256 images of digits" in card and "200 steps of 64 images of digits" in card


@pytest.mark.slow
@pytest.mark.parametrize("stage, rows", [("pretrain", 52), ("finetune", 8)])  # pretrain writes a checkpoint at step 50
def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path, stage, rows):
    (process,) = launches.fork((*SHORT, f"run_dir={tmp_path}/run"), tmp_path / "log")
    metrics = tmp_path / f"run/.{stage}/metrics.csv"
    while not (metrics.exists() and metrics.read_text().count("\n") > rows):
        time.sleep(0.01)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "run" / stage).exists()
    resumed = run(tmp_path)
    assert "resuming from step" in (tmp_path / "log/0.txt").read_text()
    assert weights(resumed) == weights(whole)
    assert models(resumed) == models(whole)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(whole, tmp_path):
    two = run(tmp_path, "stages=[prune,finetune,evaluate]", f"model={whole}/pretrain/model", of=2)
    assert (two / "prune/masks.safetensors").read_bytes() == (whole / "prune/masks.safetensors").read_bytes()
    for name in ("dense", "pruned"):
        assert models(two)[name]["accuracy"] == models(whole)[name]["accuracy"]
        assert models(two)[name]["classes"] == models(whole)[name]["classes"]
    ours, theirs = (load_file(next((run / "finetune/model").glob("*.safetensors"))) for run in (two, whole))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_compact_model_computes_the_same(whole):
    ordinary = AutoModelForImageClassification.from_pretrained(whole / "finetune/model").eval()
    batch = pixels(4, size=8)[:, :1]
    with torch.no_grad():
        torch.testing.assert_close(load_compact(whole / "export/compact")(batch).logits, ordinary(batch).logits)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("finetune.distill=0.5", "finetune.validation=digits@test")])
def test_a_masked_lora_merges_into_an_exactly_sparse_model(again, tmp_path, more):
    code, seen, lines = again("finetune.method=lora", "finetune.lr=1e-2", *more, f"run_dir={tmp_path}/run")
    assert code == 0, lines
    masks = Masks.load(tmp_path / "run/prune/masks.safetensors")
    pruned, merged = (
        AutoModelForImageClassification.from_pretrained(tmp_path / f"run/{stage}/model")
        for stage in ("prune", "finetune")
    )
    assert not masks.violations(merged.named_parameters())
    changed = {n for (n, p), q in zip(pruned.named_parameters(), merged.parameters()) if not torch.equal(p, q)}
    assert changed == set(masks)
    assert not more or "validation perplexity" in seen


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain_lora", "full"])
def test_other_recoveries_and_reconstruction_work(again, tmp_path, method):
    stages = "stages=[prune,reconstruct,finetune,evaluate,report]"
    more = ("calibration.samples=32", "calibration.batch_size=2", "reconstruct.epochs=2", "reconstruct.lr=1e-3")
    code, _, lines = again(stages, *more, f"finetune.method={method}", f"run_dir={tmp_path}/run")
    assert code == 0, lines
    assert list(models(tmp_path / "run")) == ["dense", "pruned", "reconstructed", "finetuned"]


@pytest.mark.slow
def test_a_folder_of_timm_keeps_its_names(again, tmp_path):
    """The pruned files load into timm's own model."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 8, "patch_size": 2, "depth": 2, "embed_dim": 16, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    timm.models.save_for_hf(model, tmp_path / "model", safe_serialization=True)
    about = tmp_path / "model/config.json"  # timm 1.0.31 repeats num_classes in model_args, which transformers refuses
    about.write_text(json.dumps(json.loads(about.read_text()) | {"model_args": sizes}))
    code, _, lines = again("stages=[prune]", f"model={tmp_path}/model", f"run_dir={tmp_path}/run")
    assert code == 0, lines
    state = {}
    for path in (tmp_path / "run/prune/model").glob("*.safetensors"):
        state |= load_file(path)
    model.load_state_dict(state)
    masks = Masks.load(tmp_path / "run/prune/masks.safetensors")
    assert len(masks) == 8
    assert not masks.violations((f"timm_model.{name}", parameter) for name, parameter in model.named_parameters())
    assert "8 images of digits" in (tmp_path / "run/prune/model/README.md").read_text()


WRONG = {
    "evaluate.perplexity=[world]": "is an image classifier, which reads no text: set evaluate.perplexity=[] ",
    "evaluate.tasks=[world_homes]": "is an image classifier, which reads no text: set evaluate.tasks=[] ",
    "finetune.loss=assistant": "is an image classifier, which reads no text: set finetune.loss=all ",
    "stages=[prune,export,evaluate,speed]": "which reads no text: set stages=[prune,export,evaluate] ",
    "calibration.dataset=world": "world holds text, not images: set calibration to a data set of images",
    "calibration.dataset=self": "self holds text, not images: set calibration to a data set of images",
    "finetune.dataset=./nowhere": "no dataset at nowhere",
    "calibration.samples=5000": "digits@train has 1437 images, but 5000 are needed: set calibration.samples=1437",
    "evaluate.accuracy=[digits@dev]": "the digits have no split 'dev': use digits@train or digits@test",
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", WRONG)
def test_settings_that_do_not_fit_are_refused_before_any_work(again, tmp_path, setting):
    code, _, lines = again(setting, f"run_dir={tmp_path}/run")
    assert code == 2 and len(lines) == 1 and WRONG[setting] in lines[0], lines
    assert not (tmp_path / "run/prune").exists()


@pytest.mark.slow
def test_a_damaged_image_stops_a_training_in_one_line(again, tmp_path):
    for name in map(str, range(10)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            picture(20 * int(name) + i, "L", size=8).save(tmp_path / f"train/{name}/{i}.png")
    damaged = tmp_path / "train/7/1.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    code, _, lines = again(f"finetune.dataset={tmp_path}", "finetune.batch_size=20", f"run_dir={tmp_path}/run")
    assert code == 2 and len(lines) == 1 and f"{damaged} is damaged or no image" in lines[0], lines
    assert (tmp_path / "run/prune").exists() and not (tmp_path / "run/finetune").exists()


@pytest.mark.slow
def test_speed_is_for_models_that_generate(whole, capsys):
    assert main(["speed", str(whole / "finetune/model")]) == 2
    assert "is an image classifier, and speed measures models that generate text" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_without_a_processor_is_refused(whole, again, tmp_path):
    (tmp_path / "model").mkdir()
    for path in (whole / "pretrain/model").iterdir():
        if "processor" not in path.name:
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    code, _, lines = again(f"model={tmp_path}/model", f"run_dir={tmp_path}/run")
    assert code == 2 and len(lines) == 1 and "has no usable image processor" in lines[0], lines


def test_accuracy_is_for_image_classifiers(tiny_llama, tmp_path, monkeypatch, capsys):
    code, _, lines = typing(QUICK, monkeypatch, capsys)(
        f"model={tiny_llama}", f"run_dir={tmp_path}", "evaluate.accuracy=[digits]"
    )
    assert code == 2 and "evaluate.accuracy=digits is for image classifiers" in lines[0]


def test_augmentation_is_for_image_classifiers(tiny_llama, tmp_path, monkeypatch, capsys):
    code, _, lines = typing(QUICK, monkeypatch, capsys)(
        f"model={tiny_llama}", f"run_dir={tmp_path}", "finetune.augment=true"
    )
    assert code == 2 and "set finetune.augment=false" in lines[0]
