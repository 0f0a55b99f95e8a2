"""Blocks are written while the next ones are computed, and their files are as safetensors writes them."""

import hashlib
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.pruning.score_methods import Wanda
from pipeline.runtime import checksums, files, tensor_files
from pipeline.runtime.background import Background
from pipeline.runtime.errors import UserError
from tests.pruning.test_prune import pruned

WRITE = 0.3  # seconds to write a block


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes `WRITE` for a shard."""

    def save(tensors, path, real=tensor_files.save):
        time.sleep(WRITE)
        return real(tensors, path)

    monkeypatch.setattr(tensor_files, "save", save)


@pytest.mark.slow
def test_a_walk_does_not_wait_for_a_slow_disk(tiny_llama, tmp_path, monkeypatch, slow_disk):
    ended: list[float] = []  # when each of a layer's seven matrices is scored

    def score(self, weight_OI, total, real=Wanda.score):
        time.sleep(1.2 * WRITE / 7)
        ended.append(time.perf_counter())
        return real(self, weight_OI, total)

    monkeypatch.setattr(Wanda, "score", score)
    pruned(tiny_llama, tmp_path)
    first, last = ended[6], ended[20]
    assert last - first < 2 * 1.2 * WRITE + WRITE  # two layers; two more writes if it waited for each
    monkeypatch.undo()
    assert checksums.damaged(tmp_path) == [] and len(checksums.recorded(tmp_path)) == 6


def test_the_error_of_a_write_ends_the_walk(tiny_llama, tmp_path, monkeypatch):
    def save(tensors, path):
        raise UserError(f"cannot write {path}: full")

    monkeypatch.setattr(tensor_files, "save", save)
    with pytest.raises(UserError, match="cannot write .*model-00001-of-00004"):
        pruned(tiny_llama, tmp_path)
    monkeypatch.undo()
    masks, _ = pruned(tiny_llama, tmp_path)
    masks.check_patterns()


def test_a_background_holds_one_job_and_raises_its_error():
    background, done = Background(), []
    background.start(lambda: (time.sleep(0.1), done.append(1)))
    background.check()
    assert not done
    background.start(lambda: done.append(2))
    assert done[0] == 1
    background.wait()
    assert done == [1, 2]

    def fail():
        raise UserError("full")

    background.start(fail)
    with pytest.raises(UserError, match="full"):
        background.start(lambda: done.append(3))
    background.wait()
    assert done == [1, 2]


def test_files_are_those_of_safetensors_and_hashed(tmp_path):
    tensors = {
        "b.weight": torch.randn(3, 5, dtype=torch.bfloat16),
        "a.weight": torch.randn(4, 6).T,
        "é": torch.zeros(()),
        "none": torch.empty(0, 3),
        "codes": torch.arange(7, dtype=torch.uint8),
        "count": torch.tensor([5]),
        "scale": torch.randn(4).to(torch.float8_e4m3fn),
    }
    found = tensor_files.save(tensors, tmp_path / "a.safetensors")
    assert found == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name].float(), tensor.float()), name
    half = {name: tensor for name, tensor in tensors.items() if tensor.dtype in (torch.bfloat16, torch.float32)}
    tensor_files.save(half, tmp_path / "b.safetensors")
    save_file(
        {name: tensor.contiguous() for name, tensor in half.items()}, tmp_path / "c.safetensors", {"format": "pt"}
    )
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    rare = {"x": torch.zeros(2, dtype=torch.complex64)}  # a dtype that is left to safetensors
    assert tensor_files.save(rare, tmp_path / "d.safetensors") == files.sha256(tmp_path / "d.safetensors")


def test_notes_are_adopted_unless_damaged(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
        checksums.note(tmp_path, tmp_path / f"{name}.json", {tmp_path / name: files.sha256(tmp_path / name)})
    checksums.record(tmp_path, tmp_path / "a")
    notes = [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"]
    checksums.adopt(tmp_path, notes)
    assert checksums.recorded(tmp_path).keys() == {"a", "b"} and checksums.damaged(tmp_path) == []
    checksums.write(tmp_path, {})
    notes[1].write_text(notes[1].read_text().replace("sha256", "sha255"))
    checksums.adopt(tmp_path, notes)
    assert checksums.recorded(tmp_path).keys() == {"a"}
