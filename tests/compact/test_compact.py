"""A pruned model in compact form is small, gives back every bit, and damage to it is one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.commands.export import export
from pipeline.compact import file_format
from pipeline.compact.compact_weight import CompactWeight
from pipeline.compact.expand import expand
from pipeline.compact.file_format import CompactFolder, compress
from pipeline.engine.matrices import matrices_of
from pipeline.models import model_files, rewrite
from pipeline.runtime import files
from pipeline.runtime.errors import UserError
from pipeline.sparsity.masks import Masks, apply_
from pipeline.sparsity.patterns import parse
from tests.conftest import make_tiny_llama
from tests.engine.test_decoder import small_model
from tests.families import tiny
from tests.models.test_verify import pruned, typed  # noqa: F401


def prune_(model: torch.nn.Module, pattern: str, dense: str | None = None) -> Masks:
    """Zeroes the smallest weights in place, but where a name holds `dense`; returns the masks."""
    masks = Masks()
    for name, matrix in matrices_of(model).items():
        if dense is None or dense not in name:
            mask_OI = parse(pattern).select(matrix.weight_OI.float().abs())
            apply_(matrix.weight_OI, mask_OI)
            masks.add(name, matrix.stored(mask_OI), pattern, matrix.transposed)
    return masks


def same_tensors(ours: Path, theirs: Path) -> None:
    found, expected = (dict(model_files.tensors(folder)) for folder in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and tensor.shape == found[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("pattern", ["0.3", "0.55", "2of4", "1of8"])
def test_every_pattern_and_dtype_comes_back_to_the_bit(tmp_path, pattern, dtype):
    model = small_model("llama").to(getattr(torch, dtype))
    masks = prune_(model, pattern)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", masks, tmp_path / "compact")
    expand(tmp_path / "compact", tmp_path / "back")
    same_tensors(tmp_path / "back", tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


@torch.no_grad()
def test_all_or_nothing_kept_of_a_matrix_and_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(rewrite, "SHARD", 30_000)
    model, masks = small_model("llama"), Masks()
    weights = model.model.layers[1].mlp
    weights.up_proj.weight.zero_()
    masks.add("model.layers.1.mlp.up_proj.weight", torch.zeros(48, 32, dtype=torch.bool), "mine")
    masks.add("model.layers.1.mlp.gate_proj.weight", torch.ones(48, 32, dtype=torch.bool), "mine")
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", masks, tmp_path / "compact")
    assert len(CompactFolder(tmp_path / "compact").shards) > 2
    expand(tmp_path / "compact", tmp_path / "back")
    same_tensors(tmp_path / "back", tmp_path / "model")


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "gemma2", "mixtral", "qwen2_moe", "llama4", "qwen3_5_moe"])
@pytest.mark.slow
def test_every_kind_of_family_comes_back_to_the_bit(tmp_path, family):
    """Conv1D, tied embeddings, experts that are fused in memory only or in the files too, stored transposed, multimodal."""
    model = tiny(f"{family}:whole") if family in ("llama4", "qwen3_5_moe") else small_model(family)
    masks = prune_(model, "0.5", dense="layers.1.mlp.experts.gate_up_proj[2]")
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", masks, tmp_path / "compact")
    expand(tmp_path / "compact", tmp_path / "back")
    same_tensors(tmp_path / "back", tmp_path / "model")
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (tmp_path / "model/config.json").read_text()
    )


def test_half_the_weights_take_at_most_57_hundredths(tmp_path):
    model = small_model("llama", hidden_size=128, intermediate_size=256).bfloat16()
    masks = prune_(model, "0.5")
    model.save_pretrained(tmp_path / "model")
    dense, packed = export(tmp_path / "model", masks, tmp_path / "compact")
    assert dense == sum(2 * entry.weights for entry in masks.packed.values())
    assert packed <= 0.57 * dense
    dense_size, size = (
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in ("model", "compact")
    )
    assert dense_size - size == pytest.approx(dense - packed, abs=0.02 * dense)  # nothing of it is lost elsewhere


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_values_are_within_half_a_step(tmp_path, dtype):
    model = small_model("llama", hidden_size=256, intermediate_size=512).to(getattr(torch, dtype))
    masks = prune_(model, "2of4")
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0  # a row without weights has no scale
    model.save_pretrained(tmp_path / "model")
    dense, packed = export(tmp_path / "model", masks, tmp_path / "compact", values="int8")
    assert packed <= {4: 0.165, 2: 0.33}[model.dtype.itemsize] * dense
    assert not expand(tmp_path / "compact", tmp_path / "back")
    found, expected = (dict(model_files.tensors(tmp_path / name)) for name in ("back", "model"))
    for name, tensor in expected.items():
        ours, weight = found[name].float(), tensor.float()
        step = weight.abs().amax(-1, keepdim=True) / 127 if name in masks else 0
        rounding = torch.finfo(tensor.dtype).eps * weight.abs() if name in masks else 0
        assert ((ours - weight).abs() <= 0.5001 * step + rounding).all() and not ours[weight == 0].any(), name


def test_int8_refuses_what_it_cannot_hold():
    weight = torch.tensor([[1.0, torch.inf]])
    with pytest.raises(UserError, match="not finite"):
        compress("w", weight, torch.ones(1, 2, dtype=torch.bool), False, ("0.5",), "int8")


def test_version_1_is_read(folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    resign(old, lambda about: (about.update(version=1), [entry.pop("values") for entry in about["matrices"].values()]))
    assert expand(old, tmp_path / "t")


def test_the_commands(pruned, tmp_path, typed):  # noqa: F811
    code, said, lines = typed("export", pruned / "model", pruned / "masks.safetensors", tmp_path / "compact")
    assert (code, lines) == (0, []) and "21 pruned matrices take 0.4" in said  # 60% of float32
    code, said, lines = typed("expand", tmp_path / "compact", tmp_path / "back")
    assert (code, lines) == (0, []) and "dequantised" not in said
    code, said, lines = typed(
        "export", pruned / "model", pruned / "masks.safetensors", tmp_path / "int8", "values=int8"
    )
    assert (code, lines) == (0, []) and "21 pruned matrices take 0.1" in said
    code, said, lines = typed("expand", tmp_path / "int8", tmp_path / "other")
    assert (code, lines) == (0, []) and "dequantised" in said
    same_tensors(tmp_path / "back", pruned / "model")
    assert {p.name for p in (tmp_path / "back").iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "generation_config.json",
    }
    assert not (tmp_path / "back" / file_format.MANIFEST).exists()
    with pytest.raises(OSError, match="no file named model.safetensors"):  # and no random weights
        AutoModelForCausalLM.from_pretrained(tmp_path / "compact")


def test_what_is_typed_wrong_is_one_line(tiny_llama, pruned, tmp_path, typed):  # noqa: F811
    masks = pruned / "masks.safetensors"
    small_model("gpt2").save_pretrained(tmp_path / "other")
    for words, says in [
        (["export", tiny_llama], "3 paths are needed"),
        (["export", tiny_llama, masks, tmp_path / "new"], "pruned weights that are not +0.0"),
        (["export", tmp_path / "other", masks, tmp_path / "new"], "another model's mask file?"),
        (["export", pruned / "model", masks, tmp_path], "exists already"),
        (["export", pruned / "model", masks, tmp_path / "new", "values=int4"], "values=int4 is unknown"),
        (["expand", tiny_llama], "2 paths are needed"),
        (["expand", tiny_llama, tmp_path / "new"], "write a compact folder with"),
        (["expand", tiny_llama, tmp_path], "exists already"),
    ]:
        code, _, lines = typed(*words)
        assert code == 2 and len(lines) == 1 and says in lines[0], (words, lines)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]  # nothing half written is left


def test_minus_zero_would_be_lost_and_is_refused():
    with pytest.raises(UserError, match=r"not \+0.0"):
        compress("w", torch.tensor([[1.0, -0.0]]), torch.tensor([[True, False]]), False, ("0.5",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A compact model of a tiny Llama, for harm to copies of it."""
    root = tmp_path_factory.mktemp("compact")
    make_tiny_llama(root / "dense")
    model = AutoModelForCausalLM.from_pretrained(root / "dense")
    masks = prune_(model, "0.5")
    masks.save(root / "masks.safetensors")
    model.save_pretrained(root / "model")
    export(root / "model", masks, root / "compact")
    return root / "compact"


def refused(folder: Path, target: Path) -> str:
    with pytest.raises(UserError) as caught:
        expand(folder, target)
    assert not target.exists() and "\n" not in str(caught.value)
    return str(caught.value)


def resign(folder: Path, change) -> None:
    """Makes a change to compact.json that its digest and the hashes do not give away."""
    about = json.loads((folder / file_format.MANIFEST).read_text())
    del about["digest"]
    change(about)
    for name, entry in about["files"].items() if isinstance(about.get("files"), dict) else ():
        if (path := folder / name).is_file() and isinstance(entry, dict):
            entry["bytes"], entry["sha256"] = path.stat().st_size, files.sha256(path)
    files.write_json(folder / file_format.MANIFEST, about | {"digest": files.digest(about)})


NAME = "model.layers.0.mlp.up_proj.weight"
SHARD = "compact-00001-of-00001.safetensors"


def test_damage_is_named(folder, tmp_path):
    bad = shutil.copytree(folder, tmp_path / "bad")
    data = bytearray((bad / SHARD).read_bytes())
    data[-5] ^= 1
    (bad / SHARD).write_bytes(data)
    assert "sha256" in refused(bad, tmp_path / "t")
    (bad / SHARD).write_bytes(data[:-100])
    assert f"has {len(data) - 100} bytes but should have {len(data)}" in refused(bad, tmp_path / "t")
    (bad / SHARD).unlink()
    assert "is missing" in refused(bad, tmp_path / "t")
    (bad / file_format.MANIFEST).write_text((bad / file_format.MANIFEST).read_text().replace("0.5", "0.6"))
    assert "digest" in refused(bad, tmp_path / "t")


@pytest.mark.parametrize(
    "harm",
    [
        lambda about: about.update(version=99),
        lambda about: about.update(format="another"),
        lambda about: about["matrices"][NAME].update(values="int8"),
        lambda about: about["matrices"][NAME].update(values="int4"),
        lambda about: about["matrices"][NAME].update(shape=[2**40, 2**40]),
        lambda about: about["matrices"][NAME].update(shape=[32, 48]),
        lambda about: about["matrices"][NAME].update(shape=[-48, -32]),
        lambda about: about["matrices"][NAME].update(shape="48"),
        lambda about: about["matrices"][NAME].update(dtype="int64"),
        lambda about: about["matrices"][NAME].update(dtype="bfloat16"),
        lambda about: about["matrices"].pop(NAME),
        lambda about: about["matrices"].update(other=about["matrices"][NAME]),
        lambda about: about.update(matrices=3),
        lambda about: about.update(files=[]),
        lambda about: about.update(files={}),
        lambda about: about["files"].update({"../x.safetensors": {"bytes": 1, "sha256": ""}}),
        lambda about: about.pop("names"),
        lambda about: about.update(dtype="load"),
    ],
)
def test_a_manifest_that_does_not_fit_the_files(folder, tmp_path, harm):
    bad = shutil.copytree(folder, tmp_path / "bad")
    resign(bad, harm)
    refused(bad, tmp_path / "t")


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda t: t.update({NAME + "#values": t[NAME + "#values"][:-1].clone()}), "keeps"),
        (lambda t: t.update({NAME + "#mask": t[NAME + "#mask"] | 1 << 7}), "keeps"),
        (lambda t: t.update({NAME + "#mask": t[NAME + "#mask"][:-1].clone()}), "does not fit"),
        (lambda t: t.update({NAME + "#values": t[NAME + "#values"].half()}), "does not fit"),
        (lambda t: t.pop(NAME + "#values"), "does not fit"),
        (lambda t: t.pop(NAME + "#mask"), "does not fit"),
        (lambda t: t.update({"other#mask": t[NAME + "#mask"].clone()}), "does not fit"),
        (lambda t: t.update({NAME: torch.zeros(48, 32)}), "does not fit"),
        (lambda t: t.update({"more": torch.zeros(3)}), "does not define"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "by config.json"),
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
    ],
)
def test_tensors_that_do_not_fit(folder, tmp_path, harm, says):
    bad = shutil.copytree(folder, tmp_path / "bad")
    tensors = load_file(bad / SHARD)
    harm(tensors)
    save_file(tensors, bad / SHARD)
    resign(bad, lambda about: None)
    assert says in refused(bad, tmp_path / "t")


QUICKLY = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def int8_folder(folder, tmp_path_factory) -> Path:
    root = folder.parent
    export(root / "model", Masks.load(root / "masks.safetensors"), root / "int8", values="int8")
    return root / "int8"


@pytest.mark.parametrize("values", file_format.KINDS)
@QUICKLY
@given(some.integers(0, 6000), some.binary(min_size=1, max_size=8), some.integers(0, 3000))
def test_fuzzed_headers(folder, int8_folder, tmp_path_factory, values, place, new, cut):
    """Of the file of tensors, with sizes and hashes that fit: the answer is a line, or the model is whole, and multiplies."""
    bad = shutil.copytree(folder if values == "exact" else int8_folder, tmp_path_factory.mktemp("fuzz") / "bad")
    data = bytearray((bad / SHARD).read_bytes())
    data[place : place + len(new)] = new
    (bad / SHARD).write_bytes(data[: len(data) - cut] if cut < 100 else data)
    resign(bad, lambda about: None)
    try:
        found = CompactFolder(bad)
        for path in found.shards:
            for _, it in found.read(path):
                if isinstance(it, file_format.Compact):
                    it.dense()
                    weight = CompactWeight.from_compact(it, it.layout.dtype)
                    weight.linear(torch.ones(1, it.layout.shape_OI[-1], dtype=it.layout.dtype))
    except UserError as error:
        assert "\n" not in str(error)
