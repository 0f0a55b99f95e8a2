"""The Python API computes in memory exactly what the command does on disk, and changes nothing else."""

import copy
import dataclasses
import inspect
import json
import os
import random
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import launch
from pipeline import api as espalier
from pipeline.data import world
from pipeline.settings import schema
from tests import families
from tests.conftest import QUICK, typing

TEXTS = world.documents("train")[:400]
HELD_OUT = world.documents("test")[:40]
CALIBRATION = {"calibration": TEXTS, "samples": 8, "seq_len": 32, "batch_size": 2}
TUNING = {"max_steps": 6, "seq_len": 32, "batch_size": 4, "lr": 1e-2, "rank": 16, "alpha": 32}


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory):
    """The command on the same texts, with every stage."""
    folder = tmp_path_factory.mktemp("command")
    for name, texts in {"train": TEXTS, "test": HELD_OUT}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chosen = [f"{section}.dataset={folder}/train.jsonl" for section in ("calibration", "finetune")]
    chosen += [f"evaluate.perplexity=[{folder}/test.jsonl]", "evaluate.continuations=0"]
    chosen += ["stages=[prune,reconstruct,finetune,evaluate]", "reconstruct.accumulate=1", "reconstruct.epochs=2"]
    chosen += ["reconstruct.batch_size=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)  # one thread is faster on a busy machine
        patch.setattr(sys, "argv", ["launch.py", *QUICK, *chosen, f"model={tiny_llama}", f"run_dir={folder}/run"])
        assert launch.main() == 0
    return folder / "run"


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def same_weights(model, folder) -> bool:
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def same_masks(one, other) -> bool:
    return one.patterns == other.patterns and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
def test_prune_reconstruct_finetune_and_evaluate_equal_the_command(tiny_llama, run):
    model, tokenizer = loaded(tiny_llama)
    masks = espalier.prune(model, tokenizer, sparsity="2:4", **CALIBRATION)
    assert same_masks(masks, espalier.Masks.load(run / "prune/masks.safetensors"))
    assert same_weights(model, run / "prune/model")

    dense, _ = loaded(tiny_llama)
    rows = espalier.reconstruct(model, masks, dense, tokenizer, **CALIBRATION, accumulate=1, epochs=2)
    assert same_weights(model, run / "reconstruct/model")
    assert len(rows) == 3 and all(row["error_after"] <= row["error_before"] for row in rows)
    assert same_weights(dense, tiny_llama)

    steps = espalier.finetune(model, masks, TEXTS, tokenizer, **TUNING)
    assert same_weights(model, run / "finetune/model")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert espalier.verify(model, masks)["sparsity"] == pytest.approx(0.5, abs=0.01)

    measured = espalier.evaluate(model, tokenizer, {"mine": HELD_OUT}, seq_len=64)
    results = json.loads((run / "evaluate/results.json").read_text())["models"]["finetuned"]
    assert list(measured["perplexity"].values()) == list(results["perplexity"].values())
    assert list(measured["perplexity_stderr"].values()) == list(results["perplexity_stderr"].values())


@pytest.mark.parametrize("more", [{"method": "sparsegpt"}, {"sparsity": 0.5, "allocation": "owl"}])
@pytest.mark.slow
def test_other_methods_equal_the_command(tiny_llama, run, tmp_path, more, monkeypatch, capsys):
    model, tokenizer = loaded(tiny_llama)
    masks = espalier.prune(model, tokenizer, **CALIBRATION, **more)
    chosen = [f"prune.{key}={value}" for key, value in more.items()]
    chosen += [f"calibration.dataset={run.parent}/train.jsonl", "stages=[prune]", f"run_dir={tmp_path}/run"]
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    code, _, lines = typing(QUICK, monkeypatch, capsys)(f"model={tiny_llama}", *chosen)
    assert code == 0, lines
    assert same_masks(masks, espalier.Masks.load(tmp_path / "run/prune/masks.safetensors"))
    assert same_weights(model, tmp_path / "run/prune/model")


@pytest.mark.slow
def test_text_in_any_form_gives_the_same_masks(tiny_llama, run, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    forms = {
        "list": {"calibration": TEXTS},
        "tuple": {"calibration": tuple(TEXTS)},
        "Dataset": {"calibration": Dataset.from_dict({"text": TEXTS, "other": TEXTS})},
        "column": {"calibration": Dataset.from_dict({"body": TEXTS}), "column": "body"},
        "path": {"calibration": tmp_path / "t.jsonl", "column": "body"},
    }
    expected = espalier.Masks.load(run / "prune/masks.safetensors")
    for form, given in forms.items():
        model, tokenizer = loaded(tiny_llama)
        assert same_masks(espalier.prune(model, tokenizer, **(CALIBRATION | given)), expected), form


def test_token_ids_need_no_tokenizer_and_are_used_unchanged():
    ids = families.text(6, 16)
    masks = [espalier.prune(families.tiny("llama"), calibration=ids.to(kind)) for kind in (torch.int32, torch.int64)]
    assert same_masks(*masks)
    model = families.tiny("llama")
    other = espalier.prune(model, calibration=families.text(6, 16, seed=1), samples=1, seq_len=1)
    assert not same_masks(other, masks[0])
    assert set(espalier.evaluate(model, perplexity=[ids, ids.flatten()], seq_len=16)["perplexity"]) == {
        "text",
        "text 2",
    }


def test_bos_begins_each_window_of_a_tensor_of_token_ids(tiny_llama):
    model, tokenizer = loaded(tiny_llama)
    ids = families.text(1, 93)[0] % 100
    windows = torch.cat([torch.full((3, 1), tokenizer.bos_token_id), ids.view(3, 31)], 1)
    measured = espalier.evaluate(
        model, perplexity={"text": ids}, seq_len=32, bos=True
    )  # with the model's own tokenizer
    assert measured == espalier.evaluate(model, perplexity={"text": windows})


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "zamba2"])
def test_other_forms_of_model(family):
    """Fused experts, transposed matrices, shared layers."""
    model, ids = families.tiny(family), families.text(4, 16)
    masks = espalier.prune(model, calibration=ids)
    before = espalier.verify(model, masks)
    espalier.finetune(model, masks, ids, max_steps=3, batch_size=2, lr=1e-3)
    after = espalier.verify(model, masks)
    assert before["sparsity"] >= 0.5 and after["zeros"] >= before["zeros"] * 0.999


def state_of(model) -> tuple:
    return (
        [module.training for module in model.modules()],
        [(p.requires_grad, p.dtype, p.device, p.grad, p.data_ptr()) for p in model.parameters()],
        [type(module) for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        model.config.to_dict(),
    )


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_only_the_weights_change(tiny_llama, dtype, method):
    model, tokenizer = loaded(tiny_llama)
    model.to(dtype).train()
    model.model.layers[1].eval()
    model.model.embed_tokens.requires_grad_(False)
    dense = copy.deepcopy(model)
    before, dense_before = state_of(model), state_of(dense)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    numbers = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    masks = espalier.prune(model, tokenizer, **CALIBRATION)
    espalier.reconstruct(model, masks, dense, tokenizer, **CALIBRATION, accumulate=1, epochs=1)
    espalier.finetune(model, masks, TEXTS, tokenizer, method, **TUNING, distill=0.5, teacher=dense)
    espalier.evaluate(model, tokenizer, {"mine": HELD_OUT}, ["world_homes"], seq_len=32, limit=4)
    assert espalier.verify(model, masks)["sparsity"] >= 0.5
    assert state_of(model) == before and state_of(dense) == dense_before
    assert torch.is_grad_enabled()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == numbers
    ids = families.text(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()  # it can still be trained
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("family", ["llama", "zamba2"])
@pytest.mark.slow
def test_layers_are_pruned_on_another_device_and_copied_back(family, monkeypatch):
    """`cpu:1` stands for a GPU: torch treats it as another device, and copies each layer to it."""
    models, masks = [], []
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        monkeypatch.setattr("pipeline.runtime.processes.device", lambda device=device: device)
        model, dense, ids = families.tiny(family), families.tiny(family), families.text(8, 16)
        before = [p.data_ptr() for p in model.parameters()]
        masks.append(espalier.prune(model, calibration=ids, allocation="owl", sparsity=0.6))
        espalier.reconstruct(model, masks[-1], dense, calibration=ids, accumulate=1, epochs=1)
        assert [p.data_ptr() for p in model.parameters()] == before
        assert espalier.verify(model, masks[-1])["sparsity"] > 0.5
        models.append(model.state_dict())
    assert same_masks(*masks)
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())


def test_repeated_calls_and_two_models_in_one_process(tiny_llama):
    pruned_models = []
    for _ in range(2):
        model, tokenizer = loaded(tiny_llama)
        masks = espalier.prune(model, tokenizer, **CALIBRATION)
        espalier.finetune(model, masks, TEXTS, tokenizer, **TUNING)
        pruned_models.append((masks, model.state_dict()))
    assert same_masks(pruned_models[0][0], pruned_models[1][0])
    assert all(torch.equal(weight, pruned_models[1][1][name]) for name, weight in pruned_models[0][1].items())


def test_weights_that_do_not_train_keep_their_precision():
    model, ids = families.tiny("llama"), families.text(6, 16)
    masks = espalier.prune(model, calibration=ids)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    espalier.finetune(model, masks, ids, method="full", max_steps=2, lr=1e-2, targets=["q_proj"], precision="bf16-true")
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.endswith("q_proj.weight")}


def test_a_model_can_be_pruned_further(tiny_llama):
    model, tokenizer = loaded(tiny_llama)
    first = espalier.prune(model, tokenizer, sparsity=0.5, **CALIBRATION)
    second = espalier.prune(model, tokenizer, sparsity=0.7, **CALIBRATION)
    assert all(not (second[name] & ~first[name]).any() for name in first)


def test_validation_and_early_stopping(tiny_llama):
    model, tokenizer = loaded(tiny_llama)
    masks = espalier.prune(model, tokenizer, **CALIBRATION)
    chosen = {"validation": HELD_OUT, "validate_every": 2, "validation_samples": 4}
    rows = espalier.finetune(model, masks, TEXTS, tokenizer, "full", **TUNING, **chosen, patience=3)
    assert [row["step"] for row in rows if "val_perplexity" in row] == [2, 4, 6]


def test_masks_are_saved_loaded_and_applied(tiny_llama, tmp_path):
    model, tokenizer = loaded(tiny_llama)
    masks = espalier.prune(model, tokenizer, **CALIBRATION)
    masks.save(tmp_path / "m.safetensors")
    again = espalier.Masks.load(str(tmp_path / "m.safetensors"))
    assert same_masks(again, masks) and "50.00%" in repr(again)
    dense, _ = loaded(tiny_llama)
    with pytest.raises(espalier.UserError, match="does not match its masks"):
        espalier.verify(dense, again)
    espalier.apply(dense, again)
    assert all(torch.equal(weight, dense.state_dict()[name]) for name, weight in model.state_dict().items())


def test_verify_names_a_single_flipped_weight(tiny_llama):
    model, tokenizer = loaded(tiny_llama)
    masks = espalier.prune(model, tokenizer, **CALIBRATION)
    name = "model.layers.1.mlp.up_proj.weight"
    row, column = (~masks[name]).nonzero()[7].tolist()
    with torch.no_grad():
        model.get_parameter(name)[row, column] = 0.25
    with pytest.raises(espalier.UserError, match=rf"{name} \[{row}, {column}\] is 0.25 and should be zero"):
        espalier.verify(model, masks)
    for changes in (espalier.finetune, espalier.reconstruct):
        with pytest.raises(espalier.UserError, match=r"call espalier.apply\(model, masks\) first"):
            changes(model, masks, *([TEXTS] if changes is espalier.finetune else [copy.deepcopy(model)]))


def test_the_models_own_tokenizer_is_the_default(tiny_llama):
    model, tokenizer = loaded(tiny_llama)
    masks = espalier.prune(model, **CALIBRATION)
    assert same_masks(masks, espalier.prune(loaded(tiny_llama)[0], tokenizer, **CALIBRATION))
    model.name_or_path = model.config._name_or_path = "nowhere/at-all"
    with pytest.raises(espalier.UserError, match="pass tokenizer="):
        espalier.finetune(model, masks, TEXTS, **TUNING)


@pytest.mark.parametrize("name", ["permute", "prune", "reconstruct", "finetune", "evaluate"])
def test_defaults_equal_the_recipes_and_all_arguments_are_documented(name):
    function = getattr(espalier, name)
    sections = [schema.Calibration, getattr(schema, name.capitalize())]
    fields = [f for section in sections for f in dataclasses.fields(section)]
    known = {f.name: f.default for f in fields if f.default is not None}  # null: as in calibration
    for key, parameter in inspect.signature(function).parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty
        if key in known and key not in ("dataset", "perplexity", "tasks", "accuracy"):
            assert parameter.default == known[key], key
    for public in espalier.__all__:
        assert getattr(espalier, public).__doc__


@torch.no_grad()
def test_export_of_a_model_in_memory_and_of_a_folder(tmp_path):
    model, ids = families.tiny("llama"), families.text(2, 8)
    masks = espalier.prune(model, calibration=families.text(4, 16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = espalier.export(model, masks, tmp_path / "of_memory")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found["matrices"] == len(masks) and found["share"] == found["compact_bytes"] / found["bytes"] < 0.6
    model.save_pretrained(tmp_path / "model")
    assert espalier.export(str(tmp_path / "model"), masks, str(tmp_path / "of_folder")) == found
    weights = [
        [path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")] for name in ("of_memory", "of_folder")
    ]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "of_folder", "of_memory"]
    compact = espalier.load_compact(tmp_path / "of_memory")
    torch.testing.assert_close(compact(input_ids=ids).logits, model(input_ids=ids).logits)


def test_export_refuses_in_one_line_and_leaves_nothing(tmp_path):
    model, dense = families.tiny("llama"), families.tiny("llama")
    masks = espalier.prune(model, calibration=families.text(4, 16))
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for arguments, says in [
        ((model, masks, tmp_path / "there"), "exists already"),
        ((model, masks, tmp_path / "link"), "exists already"),
        ((dense, masks, tmp_path / "new"), "holds pruned weights that are not \\+0.0"),
        ((model, {}, tmp_path / "new"), "masks is a dict: pass the result of prune or Masks.load"),
        ((tmp_path / "none", masks, tmp_path / "new"), "no such folder"),
        ((model, masks, tmp_path / "new", "words"), "tokenizer is a str"),
    ]:
        with pytest.raises(espalier.UserError, match=says):
            espalier.export(*arguments)
        assert not (tmp_path / "new").exists()
