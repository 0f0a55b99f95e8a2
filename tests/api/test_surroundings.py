"""The API where a notebook has put the model: in inference mode, compiled, with replaced forwards, with others' weights."""

import contextlib
import copy
import functools
import math
import threading
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from pipeline import api as espalier
from pipeline.runtime.errors import UserError
from tests import families

IDS = families.text(6, 16)
TUNING = {"max_steps": 2, "batch_size": 2, "lr": 1e-2}


@pytest.fixture(scope="module")
def pruned():
    model = families.tiny("llama")
    return model, espalier.prune(model, calibration=IDS)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def tuned(model, masks, texts=IDS):
    return espalier.finetune(model, masks, texts, **TUNING)


def test_inference_mode(pruned):
    model, masks = pruned
    expected, inside = copy.deepcopy(model), copy.deepcopy(model)
    tuned(expected, masks)
    with torch.inference_mode():
        again, texts = copy.deepcopy(model), IDS.clone()
        tuned(inside, masks, texts)
        espalier.reconstruct(inside, masks, expected, calibration=texts, epochs=1, accumulate=1)
    fresh = families.tiny("llama")
    with torch.inference_mode():
        espalier.prune(fresh, calibration=texts)
    assert same(fresh, model)
    for call in (
        lambda: espalier.prune(again, calibration=IDS),
        lambda: tuned(again, masks),
        lambda: espalier.evaluate(again, perplexity=[IDS]),
    ):
        with pytest.raises(UserError, match="made inside torch.inference_mode"):
            call()


@contextlib.contextmanager
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_default_dtype() == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "surroundings",
    [
        functools.partial(torch.autocast, "cpu", torch.bfloat16),
        functools.partial(torch.device, "meta"),
        bfloat16_by_default,
    ],
    ids=["autocast", "default device", "default dtype"],
)
def test_modes_and_defaults_of_torch_do_not_count(surroundings):
    """Autocast computed Gram matrices in bfloat16, so that SparseGPT's masks and weights were others."""
    settings = {"method": "sparsegpt", "refine": "swaps", "update": "admm", "calibration": IDS}
    expected, inside = families.tiny("llama"), families.tiny("llama")
    masks = espalier.prune(expected, **settings)
    tuned(expected, masks)
    losses = espalier.evaluate(expected, perplexity=[IDS])
    with surroundings():
        tuned(inside, espalier.prune(inside, **settings))
        assert espalier.evaluate(inside, perplexity=[IDS]) == losses
    assert same(inside, expected)


@pytest.mark.parametrize("part", ["", "model.layers.0", "model.layers.0.mlp"])
def test_compiled_parts_run_uncompiled(pruned, part):
    """In compiled code, hooks observe nothing: its matrices stayed dense."""
    torch.compiler.reset()
    model = families.tiny("llama")
    model.get_submodule(part).compile(backend="eager")
    masks = espalier.prune(model, calibration=IDS)
    assert same(model, pruned[0]) and len(masks) == len(pruned[1])
    expected = copy.deepcopy(pruned[0])
    assert tuned(model, masks)[-1]["loss"] == tuned(expected, masks)[-1]["loss"] and same(model, expected)


def wrapped(module: nn.Module) -> None:
    forward = module.forward
    module.forward = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))


def compiled(module: nn.Module) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


@pytest.mark.parametrize("replace", [wrapped, compiled])
@pytest.mark.parametrize("part", ["", "model.layers.1"])
def test_a_forward_that_a_copy_cannot_take_along(pruned, part, replace):
    """The copy that is trained would run the layer of the model, so that nothing in it is trained."""
    model = copy.deepcopy(pruned[0])
    replace(model.get_submodule(part))
    with pytest.raises(UserError, match=f"^{part}{'.' if part else ''}forward was replaced by a function"):
        tuned(model, pruned[1])
    again = families.tiny("llama")
    replace(again.get_submodule(part))
    with pytest.raises(UserError, match="forward was replaced by a function"):  # it needs a copy too
        espalier.prune(again, calibration=IDS, method="sparsegpt", target="dense")
    espalier.prune(again, calibration=IDS)
    assert same(again, model)


def test_windows_without_a_loss_are_refused(pruned):
    model, masks = pruned
    one = IDS[:, :1]
    for call in (
        lambda: tuned(model, masks, one),
        lambda: espalier.finetune(model, masks, IDS, validation=one, validation_samples=2, **TUNING),
        lambda: espalier.evaluate(model, perplexity=[one]),
    ):
        with pytest.raises(UserError, match="holds windows of one token"):
            call()


def test_what_stays_dense_is_said(capsys):
    model = families.tiny("llama")
    torch_prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", amount=0.3)
    masks = espalier.prune(model, calibration=IDS)
    assert not any("layers.0.mlp.up_proj" in name for name in masks)
    assert "mlp.up_proj.weight_orig: stays dense" in capsys.readouterr().out


def test_a_compact_model_is_only_measured(pruned, tmp_path):
    model, masks = pruned
    espalier.export(model, masks, tmp_path / "compact")
    compact = espalier.load_compact(tmp_path / "compact")
    for call in (
        lambda: espalier.prune(compact, calibration=IDS),
        lambda: espalier.verify(compact, masks),
        lambda: tuned(compact, masks),
        lambda: espalier.reconstruct(model, masks, compact, calibration=IDS),
    ):
        with pytest.raises(UserError, match="is compact: pass the model that was exported"):
            call()
    found, expected = (
        espalier.evaluate(subject, perplexity=[IDS])["perplexity"]["text"] for subject in (compact, model)
    )
    assert found == pytest.approx(expected, rel=1e-5)
    espalier.finetune(copy.deepcopy(model), masks, IDS, teacher=compact, distill=0.5, **TUNING)


def test_a_model_that_transformers_cannot_save_is_refused_in_one_line(pruned, tmp_path):
    model = copy.deepcopy(pruned[0])
    model.model.layers[1].mlp = model.model.layers[0].mlp
    masks = espalier.prune(model, calibration=IDS)
    with pytest.raises(UserError, match="^transformers cannot save the model: .*shared tensors"):
        espalier.export(model, masks, tmp_path / "compact")
    assert not any(tmp_path.iterdir())


def test_hooks_that_hold_what_cannot_be_copied(pruned):
    model, lock = copy.deepcopy(pruned[0]), threading.Lock()
    handle = model.model.layers[0].register_forward_hook(functools.partial(lambda lock, *_: None, lock))
    for call in (
        lambda: tuned(model, pruned[1]),
        lambda: espalier.prune(model, calibration=IDS, method="sparsegpt", target="dense"),
    ):
        with pytest.raises(UserError, match="cannot be copied .*lock.*: remove the hook"):
            call()
    handle.remove()
    tuned(model, pruned[1])


def tenfold(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: 10 * output)


def other_inputs(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (10 * args[0],))


def shifted(module: nn.Module) -> None:
    module.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) + 1, module)


@pytest.mark.parametrize("change", [tenfold, other_inputs, shifted])
def test_a_lora_keeps_the_hooks_of_its_matrices(pruned, change):
    losses = {}
    for method in ("lora", "full"):
        model = copy.deepcopy(pruned[0])
        losses[None] = espalier.evaluate(model, perplexity=[IDS[:2]])["perplexity"]["text"]
        change(model.model.layers[1].mlp.down_proj)
        expected = espalier.evaluate(model, perplexity=[IDS[:2]])["perplexity"]["text"]
        losses[method] = espalier.finetune(model, pruned[1], IDS, method=method, **TUNING)[0]["loss"]
        assert espalier.verify(model, pruned[1])["sparsity"] == 0.5
    assert losses["lora"] == pytest.approx(losses["full"], rel=1e-6) == pytest.approx(math.log(expected), rel=1e-5)
    assert expected != pytest.approx(losses[None], rel=1e-4)
