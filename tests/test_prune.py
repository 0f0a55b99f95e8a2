"""The walk prunes as the published code does, on any number of processes, and goes on where it was killed."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from callbacks.methods import METHODS, WandaPruner
from pipeline import data, models, patterns, prune, recipe
from pipeline.decoder import Decoder, matrices
from pipeline.errors import UserError
from pipeline.masks import Masks
from tests.conftest import QUICK, espalier

SETTINGS = [s for s in QUICK if not s.startswith("stages")]


def settings(model, *more):
    return recipe.load([f"model={model}", "stages=[prune]", *SETTINGS, *more])


def pruned(model, folder, *more):
    folder.mkdir(exist_ok=True)
    prune.run(settings(model, *more), folder, {})
    return Masks.load(folder / "masks.safetensors")[0], dict(models.tensors(folder / "model"))


@torch.no_grad()
def textbook_wanda(model, windows, pattern):
    """The published order of things: sample by sample, two full passes a layer, the running mean of squared norms."""
    decoder = Decoder(model)
    hidden = [decoder.embed(window[None]) for window in windows]
    for index, layer in enumerate(decoder.layers):
        scaler, hooks = {}, []
        for name, module in matrices(layer).items():
            scaler[name] = torch.zeros(module.in_features, dtype=torch.float64)

            def add(module, args, out, name=name) -> None:
                scaler[name] += args[0].flatten(0, -2).double().norm(dim=0) ** 2

            hooks.append(module.register_forward_hook(add))
        for h in hidden:
            decoder.run(index, layer, h)
        for hook in hooks:
            hook.remove()
        for name, module in matrices(layer).items():
            score = module.weight.abs() * (scaler[name] / len(windows)).sqrt().float()
            gone = torch.zeros_like(score, dtype=torch.bool)
            if isinstance(pattern, patterns.NofM):
                for start in range(0, score.shape[1], pattern.m):
                    lowest = torch.topk(
                        score[:, start : start + pattern.m], pattern.m - pattern.n, dim=1, largest=False
                    )[1]
                    gone.scatter_(1, start + lowest, True)
            else:
                order = torch.sort(score, dim=-1, stable=True)[1]
                gone.scatter_(1, order[:, : int(score.shape[1] * pattern.ratio)], True)
            module.weight[gone] = 0
        hidden = [decoder.run(index, layer, h) for h in hidden]
    return dict(model.state_dict())


@pytest.mark.parametrize("sparsity", ["2of4", "4of8", "0.5", "0.7"])
def test_equal_to_the_textbook(tiny_llama, tmp_path, sparsity):
    chosen = settings(tiny_llama, f"prune.sparsity={sparsity}", "calibration.batch_size=1")
    masks, weights = pruned(tiny_llama, tmp_path / "p", f"prune.sparsity={sparsity}", "calibration.batch_size=1")
    windows = data.calibration(data.source("world"), models.tokenizer(tiny_llama, chosen), 8, 32, seed=0)
    expected = textbook_wanda(AutoModelForCausalLM.from_pretrained(tiny_llama), windows, patterns.parse(sparsity))
    assert len(masks) == 3 * 7
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name
    for name, mask in masks.items():
        assert torch.equal(weights[name] != 0, mask)
        assert not torch.signbit(weights[name][~mask]).any()


def test_the_folder_is_an_ordinary_model(tiny_llama, tmp_path):
    masks, weights = pruned(tiny_llama, tmp_path / "p")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "p" / "model")
    assert masks.violations(loaded.named_parameters()) == []
    masks.check_patterns()
    assert (tmp_path / "p/model/config.json").read_bytes() == (tiny_llama / "config.json").read_bytes()
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in weights.items() if name not in masks)
    rows = (tmp_path / "p" / "layers.csv").read_text().splitlines()
    assert len(rows) == 1 + 3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_pattern(tiny_llama, tmp_path, method):
    for sparsity in ("2of4", "0.5"):
        masks, _ = pruned(tiny_llama, tmp_path / sparsity, f"prune.method={method}", f"prune.sparsity={sparsity}")
        masks.check_patterns()
        assert masks.sparsity() == pytest.approx(0.5)


def test_magnitude_is_one_threshold_for_a_matrix(tiny_llama, tmp_path):
    masks, weights = pruned(tiny_llama, tmp_path / "p", "prune.method=magnitude", "prune.sparsity=0.6")
    dense = dict(models.tensors(tiny_llama))
    for name, mask in masks.items():
        assert dense[name][mask].abs().min() >= dense[name][~mask].abs().max()


class Killed(Exception):
    pass


def test_killed_at_a_layer_it_goes_on_there(tiny_llama, tmp_path, monkeypatch):
    whole_masks, whole = pruned(tiny_llama, tmp_path / "whole")
    begun = []

    def score(self, weight_OI, total, original=WandaPruner.score):
        begun.append(weight_OI.shape)
        if len(begun) == 7 + 3:  # in the middle of the second layer
            raise Killed
        return original(self, weight_OI, total)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(WandaPruner, "score", score)
        pruned(tiny_llama, tmp_path / "p")
    first = tmp_path / "p/model/model-00001-of-00004.safetensors"
    written = first.stat().st_mtime_ns
    masks, weights = pruned(tiny_llama, tmp_path / "p")
    assert first.stat().st_mtime_ns == written
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    assert (tmp_path / "p/masks.safetensors").read_bytes() == (tmp_path / "whole/masks.safetensors").read_bytes()


def test_two_processes_prune_as_one(tiny_llama, tmp_path):
    for processes in (1, 2):
        espalier(
            f"model={tiny_llama}", *QUICK, "stages=[prune]", f"run_dir={tmp_path}/{processes}", processes=processes
        )
    one, two = (tmp_path / str(n) / "prune" for n in (1, 2))
    assert (one / "masks.safetensors").read_bytes() == (two / "masks.safetensors").read_bytes()
    for shard in (one / "model").glob("*.safetensors"):
        assert shard.read_bytes() == (two / "model" / shard.name).read_bytes()


def test_bad_input_says_what_to_type(tiny_llama, tmp_path):
    for more, says in [
        (["prune.sparsity=1of5"], "not divisible by 5"),
        (["calibration.seq_len=4096"], "calibration.seq_len=128"),
        (["calibration.dataset=./nowhere"], "no dataset at"),
        (["model=./nowhere"], "no such folder"),
    ]:
        with pytest.raises(UserError, match=says):
            pruned(tiny_llama, tmp_path / "p", *more)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no config.json"):
        pruned(empty, tmp_path / "p")


def test_weights_that_are_not_finite_are_named(tiny_llama, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_llama, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds weights that are not finite"):
        pruned(folder, tmp_path / "p")
