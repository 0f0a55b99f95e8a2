"""The walk over models that call their layers in unusual ways: what it prunes, with which statistics, and resuming."""

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.data import sources, token_windows
from pipeline.engine.blocks import Block, find_blocks
from pipeline.engine.coverage import Coverage
from pipeline.engine.layerwise import hidden_states
from pipeline.engine.matrices import coverage_entries, matrices, matrices_of
from pipeline.engine.observe import InputObserver
from pipeline.engine.walk import LayerWalk
from pipeline.models import loading, model_files, processors
from pipeline.pruning import calibration, scores
from pipeline.pruning.score_methods import Wanda
from pipeline.reporting import series
from pipeline.runtime.errors import UserError
from pipeline.settings import schema
from pipeline.sparsity.masks import by_matrix
from pipeline.sparsity.patterns import NofM
from pipeline.stages import reconstruct
from tests import launches
from tests.conftest import PRUNE
from tests.families import save, text, tiny
from tests.pruning.test_prune import Killed, pruned, settings


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """The folder of a tiny model of a family."""
    where = tmp_path_factory.mktemp("kinds")

    def make(family: str):
        if not (where / family).exists():
            save(family, where / family)
        return where / family

    return make


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> str:
    """The setting of a calibration text within these models' vocabulary."""
    path = tmp_path_factory.mktemp("text") / "tokens.parquet"
    datasets.Dataset.from_dict({"input_ids": text(32, 48).tolist()}).to_parquet(path)
    return f"calibration.dataset={path}"


KINDS = (
    "gemma4_text",
    "gemma3n_text",
    "zamba2",
    "hrm_text",
    "deepseek_v4",
    "falcon_mamba",
    "bart",
    "xlm",
    "llama4_text",
)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.slow
def test_pruning_is_exact_changes_nothing_else_and_resumes_bit_for_bit(origin, tokens, tmp_path, monkeypatch, family):
    folder = origin(family)
    masks, _ = pruned(folder, tmp_path / "whole", tokens)
    masks.check_patterns()
    dense = dict(by_matrix(AutoModelForCausalLM.from_pretrained(folder).named_parameters()))
    now = dict(by_matrix(AutoModelForCausalLM.from_pretrained(tmp_path / "whole/model").named_parameters()))
    assert set(now) == set(dense) and set(masks) <= set(now)
    for name, weight in now.items():
        assert torch.equal(weight, dense[name] * masks[name] if name in masks else dense[name]), name

    names = list(masks)
    killed_at, begun = len(names) // 2, []

    def score(self, weight_OI, total, original=Wanda.score):
        begun.append(weight_OI.shape)
        if len(begun) == killed_at:
            raise Killed
        return original(self, weight_OI, total)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Wanda, "score", score)
        pruned(folder, tmp_path / "p", tokens)
    pruned(folder, tmp_path / "p", tokens)
    assert (tmp_path / "p/masks.safetensors").read_bytes() == (tmp_path / "whole/masks.safetensors").read_bytes()
    for path in (tmp_path / "whole/model").glob("*.safetensors"):
        one, two = load_file(path), load_file(tmp_path / "p/model" / path.name)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("family", "kind"), [("falcon_mamba", "mixer.dt_proj.weight"), ("bart", "encoder_attn.k_proj.weight")]
)
def test_an_uncalled_matrix_stays_dense_and_is_reported(origin, tokens, tmp_path, capsys, family, kind):
    masks, _ = pruned(origin(family), tmp_path / "p", tokens)
    assert masks and not any(name.endswith(kind) for name in masks)
    assert f"0.{kind}" in capsys.readouterr().out
    rows = {row["kind"]: row["reason"] for row in series.read(tmp_path / "p/coverage.csv")}
    assert rows[kind] == "the model never calls it with calibration text"


@torch.no_grad()
def test_a_repeated_block_is_pruned_once_with_the_inputs_of_its_first_call(origin, tokens, tmp_path):
    """Its later calls run after it is pruned, so their inputs are unknown at that time."""
    folder = origin("hrm_text")
    masks, _ = pruned(folder, tmp_path / "p", tokens)
    model = AutoModelForCausalLM.from_pretrained(folder)
    source = sources.source(tokens.partition("=")[2])
    windows = token_windows.calibration(source, processors.tokenizer(folder, settings(folder)), 8, 32, seed=0)
    seen = []  # (matrix, its input); gate and up are still dense when it is scored
    for name in (name for name in masks if name.endswith("down_proj.weight")):
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda module, args, name=name: seen.append((name, args[0])))
    for batch in windows.split(2):
        model(input_ids=batch, use_cache=False)
    name = seen[0][0]  # of the block that is reached first
    inputs = [tensor for known_as, tensor in seen if known_as == name]
    calls = len(inputs) // 4  # batches
    assert calls > 1
    first = torch.cat([tensor.flatten(0, 1) for tensor in inputs[::calls]])
    expected = NofM(2, 4).select(model.get_parameter(name).abs() * first.double().square().sum(0).sqrt().float())
    assert torch.equal(masks[name], expected)


def test_shared_weights_are_pruned_and_written_once(origin, tokens, tmp_path):
    folder = origin("zamba2")
    masks, weights = pruned(folder, tmp_path / "p", tokens)
    once = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert set(masks) <= set(once)
    assert weights.keys() == dict(model_files.tensors(folder)).keys()
    shared = [name for name in masks if "shared_transformer" in name]
    assert len(shared) == len({name.partition("shared_transformer")[2] for name in shared}) > 0


@pytest.mark.slow
def test_experts_that_a_process_never_reaches_use_the_statistics_of_others(origin, tokens, tmp_path, capsys):
    """Two processes have 16 tokens each; some of the 2 x 4 x 4 experts are reached on only one of them."""
    folder, few = (
        origin("mixtral"),
        (tokens, "calibration.samples=4", "calibration.seq_len=8", "calibration.batch_size=2"),
    )
    pruned(folder, tmp_path / "one", *few)
    assert "pruned by weight alone" in capsys.readouterr().out
    launches.run((f"model={folder}", *PRUNE, *few, f"run_dir={tmp_path}/two"), tmp_path / "log", of=2)
    one, two = (
        path.read_bytes() for path in (tmp_path / "one/masks.safetensors", tmp_path / "two/prune/masks.safetensors")
    )
    assert one == two


class RaisesStopIteration(nn.Module):
    def forward(self, *args, **kwargs):
        return next(iter(()))


def test_stop_iteration_in_a_layer_is_an_error(origin, tokens, tmp_path, monkeypatch):
    """Lightning would take StopIteration for the end of the data, and the remaining layers would silently stay dense."""
    model = tiny("llama")
    model.model.layers[1].input_layernorm = RaisesStopIteration()
    monkeypatch.setattr(loading, "load", lambda *args: model)
    with pytest.raises(UserError, match="model.layers.1 raises StopIteration"):
        pruned(origin("llama"), tmp_path / "p", tokens)


def test_a_layer_that_returns_no_tensor_is_refused():
    with pytest.raises(UserError, match="return a object without a tensor"):
        hidden_states(object())


@pytest.mark.slow
def test_reconstruction_of_blocks_with_shared_weights(origin, tokens, tmp_path, monkeypatch):
    """Shared weights are trained with the first block: its shard is already written when the others are trained."""
    folder, reached = origin("zamba2"), []
    pruned(folder, tmp_path / "prune", tokens)
    (tmp_path / "reconstruct").mkdir()

    def predict_step(self, block, number, original=LayerWalk.predict_step):
        reached.append((block.name, self.forwards.forwards[0].args[0].clone()))
        return original(self, block, number)

    monkeypatch.setattr(LayerWalk, "predict_step", predict_step)
    chosen = settings(folder, tokens, "reconstruct.epochs=1", "reconstruct.samples=8", "reconstruct.accumulate=2")
    reconstruct.run(chosen, tmp_path / "reconstruct", {"prune": tmp_path / "prune"})
    model, given = AutoModelForCausalLM.from_pretrained(tmp_path / "reconstruct/model"), {}
    for name, _ in reached:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda layer, args, name=name: given.update({name: args[0]}))
    batch = calibration.batches(chosen, schema.reconstruction_text(chosen), "reconstruct", folder, model)[0]
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)
    for name, hidden in reached:
        torch.testing.assert_close(given[name], hidden, rtol=1e-5, atol=1e-5)


class Layer(nn.Module):
    """q is called twice with the input, or k gets it changed in place; both products have the same width."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.q, self.k, self.kind = nn.Linear(8, 8), nn.Linear(8, 8), kind

    def forward(self, hidden):
        if self.kind == "twice":
            return self.q(self.q(hidden) + 1) + self.k(input=hidden * 2)
        changed = hidden.clone()
        first = self.q(changed)
        changed += 1
        return first + self.k(changed)


@pytest.mark.parametrize("kind", ["twice", "in place"])
def test_all_inputs_of_a_matrix_are_observed(kind):
    layer, batches = Layer(kind), [torch.randn(3, 8) for _ in range(3)]
    block = Block(0, "layers.0", layer)
    block_matrices, seen = matrices(block, [block]), {"layers.0.q.weight": [], "layers.0.k.weight": []}
    observer = InputObserver(block_matrices, scores.square_sum)
    for name, kept in seen.items():
        module = block_matrices[name].module
        module.register_forward_pre_hook(
            lambda module, args, kwargs, kept=kept: kept.append([*args, *kwargs.values()][0].clone()), with_kwargs=True
        )
    with torch.no_grad():
        for batch in batches:
            layer(batch)  # the plain loop
        expected = {name: torch.cat(kept).double().square().sum(0) for name, kept in seen.items()}
        for batch in batches:
            with observer.batch():
                layer(batch)
    for name, total in expected.items():
        torch.testing.assert_close(observer.observed.totals[name], total, rtol=1e-6, atol=0)


def test_nested_lists_are_flattened_and_a_layer_listed_twice_is_one_block():
    model, layer = nn.Module(), Layer("twice")
    model.layers = nn.ModuleList([nn.ModuleList([layer, Layer("twice")]), nn.ModuleList([layer])])
    assert [block.name for block in find_blocks(model)] == ["layers.0.0", "layers.0.1"]


def test_layers_in_other_containers_are_refused_or_reported():
    model = nn.Module()
    model.layers = nn.Sequential(*(nn.Sequential(nn.ModuleList([Layer("twice")])) for _ in range(2)))
    with pytest.raises(UserError, match="found lists inside of layers"):
        find_blocks(model)
    model.layers, model.more = nn.ModuleList([Layer("twice")]), nn.Sequential(Layer("twice"))
    rows = Coverage(coverage_entries(model, find_blocks(model)), matrices_of(model)).rows(matrices_of(model))
    assert [row["kind"] for row in rows if row["reason"] == "outside the layers"] == [
        "more.*.q.weight",
        "more.*.k.weight",
    ]
