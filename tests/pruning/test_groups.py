"""`prune.group` and `calibration.activations`, compared with a plain loop over a Llama's layers."""

import contextlib
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline import api as espalier
from pipeline.data import sources, token_windows
from pipeline.models import processors
from pipeline.pruning.block_pruner import BlockPruner
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from tests import textbook
from tests.engine.test_decoder import small_model
from tests.families import tiny
from tests.pruning.test_prune import Killed, pruned, settings


@torch.no_grad()
def plain(origin, chosen, group: str, activations: str, ratio: float) -> dict[str, torch.Tensor]:
    """Wanda's masks by parameter name."""
    model = AutoModelForCausalLM.from_pretrained(origin)
    source = sources.source(chosen.calibration.dataset, chosen.mirror, "train")
    windows = token_windows.calibration(
        source, processors.tokenizer(origin, chosen), 8, chosen.calibration.seq_len, seed=0
    )
    hidden, arguments, masks = [], {}, {}

    def catch(module, args, kwargs) -> None:
        hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        arguments.update(kwargs)
        raise textbook.FirstLayerReached

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with contextlib.suppress(textbook.FirstLayerReached):
            model(window[None], use_cache=False)
    hook.remove()
    for number, layer in enumerate(model.model.layers):
        modules = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        statistics = {name: textbook.Statistics(module, "wanda") for name, module in modules.items()}
        hooks = [module.register_forward_hook(statistics[name].hook()) for name, module in modules.items()]
        dense = [layer(h, **arguments) for h in hidden]
        for hook in hooks:
            hook.remove()
        scores = {name: textbook.wanda(module.weight, statistics[name].norm()) for name, module in modules.items()}
        all_scores = torch.cat([score.flatten() for score in scores.values()]).sort().values
        for name, score in scores.items():
            if group == "row":
                kept = torch.ones_like(score, dtype=torch.bool)
                kept.scatter_(1, score.sort(dim=1, stable=True).indices[:, : int(score.shape[1] * ratio)], False)
            else:
                ordered = score.flatten().sort().values if group == "matrix" else all_scores
                kept = score > ordered[int(len(ordered) * ratio)]
            masks[f"model.layers.{number}.{name}.weight"] = kept
            modules[name].weight.data[~kept] = 0
        hidden = dense if activations == "dense" else [layer(h, **arguments) for h in hidden]
    return masks


@pytest.mark.parametrize("activations", ["pruned", "dense"])
@pytest.mark.parametrize("group", ["row", "matrix", "layer"])
def test_masks_equal_a_plain_loop(tiny_llama, tmp_path, group, activations):
    more = (f"prune.group={group}", f"calibration.activations={activations}", "prune.sparsity=0.6")
    more += ("calibration.batch_size=1",)
    masks, _ = pruned(tiny_llama, tmp_path / "p", *more)
    expected = plain(tiny_llama, settings(tiny_llama, *more), group, activations, 0.6)
    assert set(masks) == set(expected)
    for name, mask in masks.items():
        # sums in another order may move a score across a threshold
        assert (mask != expected[name]).float().mean() < 1e-3, name
    masks.check_patterns()
    assert masks.sparsity() == pytest.approx(0.6, abs=0.01)


def test_the_api_gives_the_same_masks_and_weights_as_the_command(tiny_llama, tmp_path):
    more = ("prune.group=layer", "calibration.activations=dense", "prune.sparsity=0.6", "calibration.batch_size=1")
    masks, weights = pruned(tiny_llama, tmp_path / "p", *more)
    chosen = settings(tiny_llama, *more)
    source = sources.source(chosen.calibration.dataset, chosen.mirror, "train")
    tokenizer = processors.tokenizer(tiny_llama, chosen)
    windows = token_windows.calibration(source, tokenizer, 8, chosen.calibration.seq_len, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    api_masks = espalier.prune(model, sparsity=0.6, group="layer", activations="dense", calibration=windows)
    assert all(torch.equal(mask, api_masks[name]) for name, mask in masks.items())
    state = model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in weights.items())


@pytest.mark.parametrize(
    "more", [("calibration.activations=dense",), ("prune.update=least_squares", "prune.target=dense")]
)
def test_a_killed_run_that_follows_the_dense_model_resumes_to_the_bit(tiny_llama, tmp_path, monkeypatch, more):
    _, whole = pruned(tiny_llama, tmp_path / "whole", *more)
    visit = BlockPruner.__call__

    def stop(self, walk, block):
        if block.index == 2:
            raise Killed
        return visit(self, walk, block)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(BlockPruner, "__call__", stop)
        pruned(tiny_llama, tmp_path / "p", *more)
    _, weights = pruned(tiny_llama, tmp_path / "p", *more)
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    assert (tmp_path / "p/masks.safetensors").read_bytes() == (tmp_path / "whole/masks.safetensors").read_bytes()


def test_dense_activations_do_not_depend_on_pruned_layers(tiny_llama, tmp_path):
    """With dense activations, the masks of a layer do not depend on whether earlier layers are pruned."""
    more = ("calibration.activations=dense",)
    whole, _ = pruned(tiny_llama, tmp_path / "whole", *more)
    last, _ = pruned(tiny_llama, tmp_path / "last", *more, 'prune.overrides={"*.layers.[01].*": dense}')
    assert 0 < len(last) < len(whole)
    assert all(torch.equal(mask, whole[name]) for name, mask in last.items())


@pytest.mark.parametrize(
    "more",
    [
        ("prune.group=row", "prune.sparsity=2of4"),
        ("prune.group=layer", "prune.sparsity=0.5", "prune.method=sparsegpt"),
        ("prune.group=matrix", "prune.sparsity=0.5", "prune.method=wanda_variant"),
    ],
)
def test_a_group_that_the_method_or_pattern_does_not_support_is_refused(more):
    with pytest.raises(UserError, match="set prune.group=auto"):
        reader.load(["model=m", "stages=[prune]", *more])


def test_experts_with_few_tokens_are_not_compared_with_the_layer():
    """Their scores are those of their weights alone, on another scale than the rest of the layer's."""
    model = small_model("mixtral")
    windows = torch.randint(3, 61, (1, 24), generator=torch.Generator().manual_seed(0))
    masks = espalier.prune(model, calibration=windows, sparsity=0.5, group="layer")
    assert masks.sparsity() == pytest.approx(0.5, abs=0.01)
    experts = [mask for name, mask in masks.items() if ".experts." in name]
    assert experts and all((mask.sum(1) == mask.shape[1] // 2).all() for mask in experts)


def test_matrices_that_lose_all_their_weights_are_reported(capsys):
    model = small_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= 1e-6
    windows = torch.randint(3, 61, (4, 24), generator=torch.Generator().manual_seed(0))
    masks = espalier.prune(model, calibration=windows, sparsity=0.5, group="layer")
    assert not masks["model.layers.1.mlp.down_proj.weight"].any()
    output = capsys.readouterr().out
    assert "matrices of this layer, such as model.layers.1." in output and "no weight is left in" in output


def test_dense_activations_refuse_layers_that_share_weights(capsys):
    """The dense weights of a layer that runs again are gone. The memory plan counts shared weights once."""
    windows = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="model.layers.2 is run twice or shares weights.*: set activations=pruned"):
        espalier.prune(tiny("zamba2"), calibration=windows, activations="dense")
    assert float(re.search(r"(-?[0-9.]+) MiB outside the layers", capsys.readouterr().out)[1]) > 0


def test_equal_scores_that_no_ratio_divides_are_refused():
    """They are pruned together: where all inputs are zero, all weights would be."""
    model = small_model("llama")
    for layer in model.model.layers:
        nn.init.zeros_(layer.mlp.down_proj.weight)
    windows = torch.randint(3, 61, (4, 24), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="equal scores to prune 0.1 of them: set group=auto"):
        espalier.prune(model, calibration=windows, sparsity=0.1, group="layer")
