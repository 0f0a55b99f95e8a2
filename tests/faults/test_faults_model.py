"""Faults of a model folder give one-line messages, and after a repair the same command has the same result as without."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.models import model_files

pytestmark = pytest.mark.slow

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.fixture(scope="module")
def forms(tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """The same model as one file and as shards with an index, each in safetensors and torch.save files."""
    folder = tmp_path_factory.mktemp("forms")
    folders = {"one": tiny_llama}
    for form in ("shards", "bin", "bin shards"):
        folders[form] = folder / form
        shutil.copytree(tiny_llama, folder / form)
        (folder / form / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder / "shards", max_shard_size="40KB")
    torch.save(load_file(tiny_llama / "model.safetensors"), folder / "bin/pytorch_model.bin")
    for shard in (folder / "shards").glob("*.safetensors"):
        torch.save(load_file(shard), folder / "bin shards" / as_bin(shard.name))
    index = json.loads((folder / "shards/model.safetensors.index.json").read_text())
    index["weight_map"] = {name: as_bin(file) for name, file in index["weight_map"].items()}
    (folder / "bin shards/pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folders


def as_bin(name: str) -> str:
    return name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")


def cut(name: str, share: float = 0.5):
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return damage


def put(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def change_weights(change):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = {name: weight.clone() for name, weight in load_file(path).items()}
        change(weights)
        save_file(weights, path, {"format": "pt"})

    return damage


SECOND = "model-00002-of-00004.safetensors"


@pytest.mark.parametrize(
    ("form", "damage", "says"),
    [
        ("one", cut("model.safetensors"), r"model.safetensors \(\d+ bytes\) is damaged or incomplete"),
        ("one", cut("model.safetensors", 0), r"model.safetensors \(0 bytes\) is damaged"),
        (
            "one",
            put("model.safetensors", "version https://git-lfs.github.com/spec/v1"),
            r"model.safetensors \(42 bytes\)",
        ),
        ("one", lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        ("shards", cut(SECOND), rf"{SECOND} \(\d+ bytes\) is damaged"),
        ("shards", cut(SECOND, 0), rf"{SECOND} \(0 bytes\) is damaged"),
        ("shards", lambda folder: (folder / SECOND).unlink(), rf"No such file or directory: .*{SECOND}"),
        ("shards", cut("model.safetensors.index.json"), r"model.safetensors.index.json \(\d+ bytes\) is damaged"),
        ("shards", put("model.safetensors.index.json", "[]"), r"index.json \(2 bytes\) is damaged .* no weight_map"),
        (
            "shards",
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            "no file named model.safetensors",
        ),
        ("bin", cut("pytorch_model.bin"), r"pytorch_model.bin \(\d+ bytes\) is damaged"),
        ("bin", cut("pytorch_model.bin", 0), r"pytorch_model.bin \(0 bytes\) is damaged .*: EOFError"),
        ("bin shards", cut(as_bin(SECOND)), rf"{as_bin(SECOND)} \(\d+ bytes\) is damaged"),
        ("one", change_weights(lambda weights: weights.pop(UP)), rf"lacks {UP} \(1 missing\)"),
        (
            "one",
            change_weights(lambda weights: weights.update({UP: torch.zeros(3, 3)})),
            rf"{UP} is \(3, 3\) in the files",
        ),
        ("one", cut("config.json"), r"config.json \(\d+ bytes\) is damaged"),
        ("one", cut("config.json", 0), r"config.json \(0 bytes\) is damaged"),
        ("one", put("config.json", "{}"), "Should have a `model_type`"),
        ("one", cut("tokenizer.json"), r"no usable tokenizer: tokenizer.json \(\d+ bytes\) is damaged"),
        ("one", put("tokenizer.json", "{}"), "no usable tokenizer"),
        ("one", lambda folder: (folder / "tokenizer.json").unlink(), "no usable tokenizer"),
        ("one", cut("tokenizer_config.json"), r"tokenizer_config.json \(\d+ bytes\) is damaged"),
    ],
)
def test_a_damaged_model_folder(forms, whole_masks, tmp_path, refused, finishes, form, damage, says):
    folder = tmp_path / "model"
    shutil.copytree(forms[form], folder)
    damage(folder)
    line = refused(tmp_path / "run", f"model={folder}")
    assert re.search(says, line), line
    shutil.rmtree(folder)
    shutil.copytree(forms[form], folder)
    assert finishes(tmp_path / "run", f"model={folder}")[0] == whole_masks


@pytest.mark.parametrize("form", ["shards", "bin", "bin shards"])
def test_file_formats_do_not_change_the_masks(forms, whole_masks, tmp_path, finishes, form):
    assert finishes(tmp_path, f"model={forms[form]}")[0] == whole_masks
    assert not list((tmp_path / "prune/model").glob("*.bin*"))
    dense = dict(model_files.tensors(forms["one"]))
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "prune/model").named_parameters():
        assert weight[weight != 0].equal(dense[name][weight != 0])


@pytest.mark.parametrize(
    ("method", "name", "value", "says"),
    [
        ("wanda", UP, 1e30, "the inputs of model.layers.1.mlp.down_proj.weight are not finite"),
        ("wanda", UP, 3e38, f"scores of {UP} are not finite"),
        ("sparsegpt", UP, 3e38, f"updates of {UP} overflow"),
        ("wanda", UP, torch.inf, f"{UP} holds weights that are not finite"),
        (
            "sparsegpt",
            NORM,
            torch.nan,
            "the inputs of model.layers.1.mlp.gate_proj.weight and .*up_proj.weight are not finite",
        ),
        ("wanda", "model.embed_tokens.weight", torch.inf, "the inputs of model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_non_finite_weights_and_activations_are_named(
    tiny_llama, tmp_path, refused, finishes, method, name, value, says
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    change_weights(lambda weights: weights[name].fill_(value))(folder)
    settings = (f"model={folder}", f"prune.method={method}")
    line = refused(tmp_path / "run", *settings)
    assert re.search(says, line), line
    shutil.copyfile(tiny_llama / "model.safetensors", folder / "model.safetensors")
    finishes(tmp_path / "run", *settings)


def test_overflow_in_float16_suggests_another_dtype(tiny_llama, tmp_path, refused, finishes):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(3e4)
    model.save_pretrained(tmp_path / "model")
    for path in tiny_llama.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "model" / path.name)
    line = refused(tmp_path / "run", f"model={tmp_path}/model")
    assert "the inputs of model.layers.1.mlp.down_proj.weight are not finite: set dtype=bfloat16" in line
    finishes(tmp_path / "run", f"model={tmp_path}/model", "dtype=bfloat16")


@pytest.mark.parametrize("method", ["sparsegpt", "wanda_seq"])
def test_a_singular_gram_matrix_is_damped_further(tiny_llama, tmp_path, finishes, method):
    few = ("calibration.samples=1", "calibration.seq_len=8", "prune.damp=0", f"prune.method={method}")
    _, output = finishes(tmp_path, f"model={tiny_llama}", *few)
    assert "model.layers.0.mlp.down_proj.weight: the Gram matrix is singular at damping 0: trying 0.0001" in output
    for name, weight in model_files.tensors(tmp_path / "prune/model"):
        assert weight.isfinite().all(), name
