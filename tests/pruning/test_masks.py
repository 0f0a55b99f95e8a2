"""Masks are packed, saved and checked without losing a bit."""

import pytest
import torch

from pipeline.runtime.errors import UserError
from pipeline.sparsity.masks import Masks, apply_


def some_masks() -> Masks:
    masks = Masks()
    for index, shape in enumerate([(5, 12), (3, 7), (16, 4)]):
        masks.add(f"layers.{index}.weight", torch.rand(shape) < 0.5, "0.5", transposed=index == 2)
    return masks


def test_a_mask_file_keeps_every_bit_at_one_bit_per_weight(tmp_path):
    masks = some_masks()
    masks.save(tmp_path / "masks.safetensors", {"seconds": 1.5})
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert loaded.log == {"seconds": 1.5}
    assert loaded.patterns == masks.patterns
    assert {name: entry.transposed for name, entry in loaded.packed.items()} == {
        name: name == "layers.2.weight" for name in masks
    }
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    big = Masks()
    big.add("w", torch.rand(1000, 1000) < 0.5, "0.5")
    big.save(tmp_path / "big.safetensors")
    assert (tmp_path / "big.safetensors").stat().st_size < 1000 * 1000 / 8 + 500


def test_equal_masks_are_equal_files(tmp_path):
    masks = some_masks()
    other = Masks()
    for name in reversed(list(masks)):
        other.add(name, masks[name], masks.patterns[name], masks.packed[name].transposed)
    masks.save(tmp_path / "a.safetensors")
    other.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pruned_weights_become_plus_zero_and_others_are_unchanged(dtype):
    weight, mask = torch.randn(32, 32).to(dtype), torch.rand(32, 32) < 0.5
    pruned = apply_(weight.clone(), mask)
    assert torch.equal(pruned[mask], weight[mask])
    assert (pruned[~mask] == 0).all()
    assert not torch.signbit(pruned[~mask]).any()


def test_a_single_violation_is_found_with_its_index():
    masks = some_masks()
    weights = {name: apply_(torch.randn(mask.shape), mask) for name, mask in masks.items()}
    assert masks.violations(iter(weights.items())) == []
    row, column = (~masks["layers.1.weight"]).nonzero()[0].tolist()
    weights["layers.1.weight"][row, column] = 1e-30
    (violation,) = masks.violations(iter(weights.items()))
    assert (violation.name, violation.count, violation.first) == ("layers.1.weight", 1, (row, column))
    assert violation.value == pytest.approx(1e-30)
    weights["layers.1.weight"][row, column] = torch.nan
    assert len(masks.violations(iter(weights.items()))) == 1


def test_masks_of_another_model_are_refused():
    masks = some_masks()
    with pytest.raises(UserError, match="another model"):
        masks.violations(iter({"layers.0.weight": torch.zeros(2, 2)}.items()))
    with pytest.raises(UserError, match="has no layers"):
        masks.violations(iter({}.items()))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "masks.safetensors"
    some_masks().save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not a mask file"):
        Masks.load(path)


def test_a_mask_that_breaks_its_pattern_is_found():
    masks = Masks()
    masks.add("w", torch.ones(4, 8, dtype=torch.bool), "2of4")
    with pytest.raises(UserError, match="break 2of4"):
        masks.check_patterns()


def test_a_pattern_file_named_in_a_mask_file_is_not_executed(tmp_path):
    code = tmp_path / "pattern.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    masks = Masks()
    masks.add("w", torch.ones(4, 8, dtype=torch.bool), str(code))
    masks.save(tmp_path / "masks.safetensors")
    Masks.load(tmp_path / "masks.safetensors").check_patterns()
    assert not (tmp_path / "ran").exists()
