"""The permuted model computes what the dense one does, only with its channels in another order, and N of M keeps more of it."""

import csv
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import espalier
import launch
from callbacks.layer_writer import LayerWriter
from pipeline.commands.plan import main
from pipeline.engine.walk import LayerWalk, run_layerwise
from pipeline.models import loading, model_files
from pipeline.pruning import block_permuter
from pipeline.pruning.block_permuter import BlockPermuter
from pipeline.reporting import runs
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.sparsity.masks import Masks
from pipeline.sparsity.patterns import NofM
from pipeline.stages import permute
from tests import families, launches
from tests.conftest import PRUNE, QUICK
from tests.images import classifiers

WORLD = [setting for setting in QUICK if not setting.startswith(("stages", "finetune", "evaluate"))]
# of the tiny models: which matrices' inputs are reordered
KINDS = {
    "llama": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},  # grouped-query attention
    "qwen2": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},  # with biases of q, k and v
    "gpt2": {"attn.c_proj.weight", "mlp.c_proj.weight"},  # Conv1D; queries, keys and values in one matrix
    "gpt_neox": {"attention.dense.weight", "mlp.dense_4h_to_h.weight"},  # the same by head
    "falcon": {"self_attention.dense.weight", "mlp.dense_4h_to_h.weight"},
    "opt": {"self_attn.out_proj.weight", "fc2.weight"},
    "phi3": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},  # gate and up in one matrix
    "mixtral": {"self_attn.o_proj.weight", "mlp.experts.down_proj[*]"},
    "gpt_oss": {"self_attn.o_proj.weight", "mlp.experts.down_proj[*]"},  # gate and up interleaved, with biases
    "gemma4_text": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},  # layers that share keys and values
    "deepseek_v3": {
        "mlp.down_proj.weight",
        "mlp.experts.down_proj[*]",
        "mlp.shared_experts.down_proj.weight",
    },  # latent attention is left
    "bitnet": set(),  # a norm between the channels' matrices
}


def tokens(folder: Path, rows: int = 8) -> tuple[str, ...]:
    lines = [json.dumps({"input_ids": row}) for row in families.text(rows, 24).tolist()]
    (folder / "ids.jsonl").write_text("\n".join(lines))
    return (f"calibration.dataset={folder}/ids.jsonl", "calibration.seq_len=24", f"calibration.samples={rows}")


def permuted(model: Path, folder: Path, *more: str) -> Path:
    """Runs the stage; returns the permuted model."""
    folder.mkdir(exist_ok=True)
    recipe = reader.load([f"model={model}", "stages=[permute,prune]", *WORLD, *more])
    permute.run(recipe, folder, {})
    return folder / "model"


def rows(folder: Path) -> list[dict]:
    path = folder / "channels.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def reordered_from(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether the same values are there, and in the same rows or columns but for their order."""
    ordered = [tensor.float().flatten(0, -2) for tensor in (before, after)]
    by_row = [matrix.sort(1).values[matrix.sort(1).values[:, 0].argsort()] for matrix in ordered]
    by_column = [matrix.sort(0).values[:, matrix.sort(0).values[0].argsort()] for matrix in ordered]
    return torch.equal(*by_row) or torch.equal(*by_column)


QUICK_KINDS = ("llama", "gpt2")


@pytest.mark.parametrize(
    "family", [family if family in QUICK_KINDS else pytest.param(family, marks=pytest.mark.slow) for family in KINDS]
)
def test_the_permuted_model_is_the_dense_one_in_another_order(family, tmp_path):
    (tmp_path / "dense").mkdir()
    families.save(family, tmp_path / "dense")
    model = permuted(tmp_path / "dense", tmp_path / "permute", *tokens(tmp_path))
    found = rows(tmp_path / "permute")
    names = [re.sub(r"\[\d+\]", "[*]", row["matrix"]) for row in found]
    assert {next((kind for kind in KINDS[family] if name.endswith(f".{kind}")), name) for name in names} == KINDS[
        family
    ]
    assert all(float(row["kept_after"]) >= float(row["kept_before"]) for row in found)
    assert sum(bool(row["order"]) for row in found) >= 0.8 * len(found)

    recipe = reader.load([f"model={tmp_path}/dense", "stages=[prune]"])
    dense, other = (loading.load(folder, recipe) for folder in (tmp_path / "dense", model))
    with torch.no_grad():
        expected, given = (model(input_ids=families.text(2, 20, 7), use_cache=False).logits for model in (dense, other))
    assert (expected - given).abs().max() < 1e-5 * expected.abs().max()

    before, after = (dict(model_files.tensors(folder)) for folder in (tmp_path / "dense", model))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert bool(changed) == bool(KINDS[family])
    for name in changed:
        assert torch.equal(before[name].flatten().sort().values, after[name].flatten().sort().values), name
        if before[name].dim() == 2:
            assert reordered_from(before[name], after[name]), name


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2"])
@torch.no_grad()
def test_an_image_classifier_keeps_its_answers(name):
    model, images = classifiers.tiny(name), [classifiers.pixels(4), classifiers.pixels(4, seed=1)]
    expected, before = model(classifiers.pixels(2, seed=2)).logits, model.state_dict()
    before = {key: tensor.clone() for key, tensor in before.items()}
    walk = LayerWalk(model, images, None, in_memory=True)
    run_layerwise(walk, BlockPermuter(model, walk.blocks, NofM(2, 4), 1), [LayerWriter()])
    rows = [row for log in walk.results.rows for row in log["matrices"]]
    assert len(rows) == 4 and any(row["order"] for row in rows)
    assert any(not torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert (model(classifiers.pixels(2, seed=2)).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_api_gives_the_model_and_masks_of_the_command(tiny_llama, tmp_path):
    expected = permuted(tiny_llama, tmp_path / "permute", *tokens(tmp_path))
    model, texts = AutoModelForCausalLM.from_pretrained(tiny_llama), families.text(8, 24)
    text = {"calibration": f"{tmp_path}/ids.jsonl", "samples": 8, "seq_len": 24, "batch_size": 2}
    found = espalier.permute(model, sparsity="2:4", **text)
    assert len(found) == 6 and rows(tmp_path / "permute") == [{key: str(row[key]) for key in row} for row in found]
    other = AutoModelForCausalLM.from_pretrained(expected)
    assert model.config.channel_order == other.config.channel_order
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in model.state_dict().items())
    assert espalier.prune(model, calibration=texts).channel_order == other.config.channel_order
    with pytest.raises(UserError, match="sparsity=0.5"):
        espalier.permute(model, sparsity="0.5", calibration=texts)
    with pytest.raises(UserError, match="unknown argument 'round'"):
        espalier.permute(model, calibration=texts, round=1)


class Killed(Exception):
    pass


@contextmanager
def killed_in_the_second_layer(monkeypatch):
    """A layer of `tiny_llama` has two matrices whose inputs are reordered."""
    begun = []

    def order(*args, original=block_permuter.channel_order):
        begun.append(args)
        if len(begun) == 2 + 1:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(block_permuter, "channel_order", order)
        yield


def test_masks_of_a_model_whose_permutation_was_interrupted_are_not_the_models(tiny_llama, monkeypatch):
    model, original = (AutoModelForCausalLM.from_pretrained(tiny_llama) for _ in range(2))
    with killed_in_the_second_layer(monkeypatch):
        espalier.permute(model, calibration=families.text(4, 16))
    masks = espalier.prune(model, calibration=families.text(4, 16))
    with pytest.raises(UserError, match="use the model that was pruned"):
        espalier.apply(original, masks)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*folder.glob("*.safetensors"), *folder.glob("config.json")]}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(tiny_llama, tmp_path, monkeypatch):
    whole = permuted(tiny_llama, tmp_path / "whole")
    with killed_in_the_second_layer(monkeypatch):
        permuted(tiny_llama, tmp_path / "p")
    first = tmp_path / "p/model/model-00001-of-00004.safetensors"
    written = first.stat().st_mtime_ns
    assert weights(permuted(tiny_llama, tmp_path / "p")) == weights(whole)
    assert first.stat().st_mtime_ns == written
    assert (tmp_path / "p/channels.csv").read_bytes() == (tmp_path / "whole/channels.csv").read_bytes()


@pytest.mark.slow
def test_two_processes_permute_and_prune_as_one(tmp_path):
    """With so few tokens, some experts are reached on one of the processes, and some on none."""
    (tmp_path / "dense").mkdir()
    families.save("mixtral", tmp_path / "dense")
    settings = (f"model={tmp_path}/dense", "stages=[permute,prune]", *WORLD, *tokens(tmp_path), "calibration.samples=2")
    settings += ("calibration.seq_len=2", "calibration.batch_size=1")
    for count in (1, 2):
        launches.run((*settings, f"run_dir={tmp_path}/{count}"), tmp_path / f"log{count}", of=count)
    for stage in ("permute/model", "prune"):
        assert weights(tmp_path / "1" / stage) == weights(tmp_path / "2" / stage)
    assert any(not row["order"] for row in rows(tmp_path / "1/permute"))


@pytest.mark.slow
def test_masks_are_of_the_permuted_model_alone(tiny_llama, tmp_path, typed, monkeypatch, capsys):
    settings = (f"model={tiny_llama}", f"run_dir={tmp_path}/run", "stages=[permute,prune]")
    code, output, lines = typed(*settings)
    assert code == 0, lines
    assert "of the importance of 6 matrices, 2of4 keeps" in output
    masks_file, model = tmp_path / "run/prune/masks.safetensors", tmp_path / "run/permute/model"
    masks = Masks.load(masks_file)
    masks.check_patterns()

    def apply(origin: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["launch.py", "apply", str(origin), str(masks_file), f"{tmp_path}/applied"])
        return launch.main(), capsys.readouterr().err

    code, said = apply(tiny_llama)
    assert code == 2 and "use the model that was pruned" in said and not (tmp_path / "applied").exists()
    assert apply(model)[0] == 0
    pruned = dict(model_files.tensors(tmp_path / "run/prune/model"))
    for name, tensor in model_files.tensors(tmp_path / "applied"):
        assert torch.equal(tensor, pruned[name]), name

    dense, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_llama, model))
    with pytest.raises(UserError, match="use the model that was pruned"):
        espalier.apply(dense, masks)
    espalier.apply(other, masks)
    assert espalier.verify(other, masks)["sparsity"] == 0.5
    again = espalier.prune(
        AutoModelForCausalLM.from_pretrained(model), calibration=families.text(4, 16), sparsity="2of4"
    )
    assert again.channel_order == masks.channel_order
    with pytest.raises(UserError, match="its original order"):
        espalier.apply(other, espalier.prune(dense, calibration=families.text(4, 16), sparsity="2of4"))

    assert typed(*settings, "prune.method=magnitude")[1].partition("permute: ")[2].startswith("done before")
    assert "permute: prune.sparsity 2of4 -> 1of4: running again" in typed(*settings, "prune.sparsity=1of4")[1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("stages=[permute,prune]", "prune.sparsity=0.5"), "set prune.sparsity=2of4, or leave permute out of stages"),
        (("stages=[permute]",), "set stages=[permute,prune,...]"),
        (("stages=[permute,prune]", "permute.rounds=-1"), "permute.rounds=-1 is out of range"),
        (("stages=[permute,prune]", "prune.sparsity=3of7"), "32 inputs are not divisible by 7, so 3of7 does not fit"),
        (("stages=[permute,prune]", "calibration.seq_len=4096"), "set calibration.seq_len=128"),
    ],
)
def test_what_cannot_be_permuted_is_refused(tiny_llama, tmp_path, refused, settings, says):
    assert says in refused(tmp_path, f"model={tiny_llama}", *settings)
    assert not (tmp_path / "permute").exists()


@pytest.mark.slow
def test_a_whole_run_shows_what_the_order_brought(tiny_llama, tmp_path, typed):
    settings = (f"model={tiny_llama}", f"run_dir={tmp_path}/run", "stages=[permute,prune,finetune,evaluate,report]")
    code, _, lines = typed(*settings, "finetune.distill=0.5", "finetune.max_steps=2")
    assert code == 0, lines
    report = (tmp_path / "run/report/report.md").read_text()
    (row,) = re.findall(r"^\| down_proj \| ([0-9.]+) \| ([0-9.]+) \|$", report, flags=re.M)
    assert float(row[0]) < float(row[1])
    assert "its channels reordered" in (tmp_path / "run/finetune/model/README.md").read_text()
    assert runs.find([tmp_path / "run"])[0].pruned_with == "Wanda + permuted channels"
    results = json.loads((tmp_path / "run/evaluate/results.json").read_text())["models"]
    assert results["pruned"]["mask_violations"] == results["finetuned"]["mask_violations"] == 0
    assert results["dense"]["hash"] == model_files.identity(tiny_llama)
    orders = {json.loads(path.read_text())["channel_order"] for path in tmp_path.glob("run/*/model/config.json")}
    assert len(orders) == 1


@pytest.mark.slow
def test_plan_knows_the_stage(tiny_llama, tmp_path, capsys):
    main([f"model={tiny_llama}", f"run_dir={tmp_path}/run", *PRUNE, "stages=[permute,prune]"])
    assert "permute reads world" in capsys.readouterr().out
