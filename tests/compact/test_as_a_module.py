"""What else users do with a compact model: torch.save, state dicts, adapters, other operators. It works, or is refused."""

import copy
import io
import operator
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from pipeline.commands.export import export
from pipeline.compact.compact_model import load_compact
from pipeline.runtime.errors import UserError
from tests.compact.test_compact import prune_
from tests.compact.test_compact_model import a_matrix
from tests.engine.test_decoder import small_model

IDS = torch.arange(3, 9)[None]


@pytest.fixture(scope="module", params=["llama", "mixtral", "gpt2"])
def both(request, tmp_path_factory):
    """The pruned model, and its compact form."""
    folder = tmp_path_factory.mktemp(request.param)
    model = small_model(request.param)
    masks = prune_(model, "0.5")
    model.save_pretrained(folder / "model")
    export(folder / "model", masks, folder / "compact")
    return model, load_compact(folder / "compact")


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def test_copies_compute_the_same(both):
    ours, file = both[1], io.BytesIO()
    torch.save(ours, file)
    assert file.tell() < 1 << 20  # not the block of memory that its weights lie in
    file.seek(0)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(ours)):
        assert torch.equal(logits(again), logits(ours))
        with pytest.raises(UserError, match="cannot change device or dtype"):
            again.half()


def test_a_refused_conversion_changes_nothing(both):
    before = {name: parameter.dtype for name, parameter in both[1].named_parameters()}
    for part in (both[1], both[1].base_model):
        for change in (part.half, part.double, lambda part=part: part.to("meta")):
            with pytest.raises(UserError, match="cannot change device or dtype"):
                change()
    assert {name: parameter.dtype for name, parameter in both[1].named_parameters()} == before


def test_a_state_dict_is_complete_and_cannot_be_loaded(both):
    dense, ours = both
    expected, found = dense.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for strict in (True, False):
        with pytest.raises(UserError, match="cannot be changed"):
            ours.load_state_dict(expected, strict=strict)


def test_an_adapter_works_and_is_not_lost_by_merging(both):
    ours = copy.deepcopy(both[1])
    target = "c_attn" if hasattr(ours, "transformer") else "q_proj"
    model = get_peft_model(ours, LoraConfig(target_modules=[target], init_lora_weights=False))
    assert not torch.equal(logits(model), logits(both[1]))
    with pytest.raises(UserError, match="nor an adapter merged into it"):
        model.merge_and_unload()


def test_changes_in_place_are_refused():
    weight, compact = a_matrix(8, 8, 0.5, torch.float32)
    for change in (
        lambda: compact.mul_(2),
        lambda: compact.data.mul_(2),
        lambda: setattr(compact, "data", weight),
        lambda: operator.setitem(compact, 0, 1.0),
        lambda: torch.nn.init.normal_(compact),
        lambda: torch.add(weight, 1, out=compact),
        lambda: compact.requires_grad_(True),
    ):
        with pytest.raises(UserError, match="cannot be changed"):
            change()
    assert torch.equal(compact.dense(), weight)
    assert torch.equal(torch.zeros(8, 8).copy_(compact), weight)


def test_operators_and_keywords():
    weight, compact = a_matrix(8, 8, 0.5, torch.float32)
    x = torch.randn(8, 8)
    for call in (
        lambda weight: weight.T @ x,
        lambda weight: weight @ x,
        lambda weight: x @ weight,
        lambda weight: x @ weight.T,
        lambda weight: weight @ weight.T,
        lambda weight: F.linear(input=x, weight=weight),
        lambda weight: F.linear(x, weight=weight, bias=x[0]),
        lambda weight: torch.matmul(x, other=weight.T),
        lambda weight: 2 * weight - weight / 3 + (1 + weight) ** 2,
        lambda weight: -weight + abs(weight) - x * weight,
    ):
        torch.testing.assert_close(call(compact), call(weight))


def test_small_files_are_compared_with_their_hashes(both, tmp_path):
    """A changed setting would change what the model computes."""
    both[0].save_pretrained(tmp_path / "model")
    export(tmp_path / "model", prune_(both[0], "0.5"), tmp_path / "compact")
    for name in ("config.json", "generation_config.json"):
        bad = tmp_path / f"bad-{name}"
        shutil.copytree(tmp_path / "compact", bad)
        text = (bad / name).read_text()
        (bad / name).write_text(text.replace("1", "2", 1))
        assert (bad / name).read_text() != text
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load_compact(bad)
