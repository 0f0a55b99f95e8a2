"""`verify` finds violations in a model folder; `apply` makes the pruned model from the dense one."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import launch
from pipeline.engine.matrices import matrices_of
from pipeline.models import model_files, verification
from pipeline.models.verification import check_matrices
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks
from tests import launches
from tests.conftest import QUICK
from tests.engine.test_decoder import small_model

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def typed(monkeypatch, capsys):
    """Runs the command in this process: (exit code, stdout, our lines on stderr)."""

    def run(*words) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, words)])
        code = launch.main()
        seen = capsys.readouterr()
        return code, seen.out, [line for line in seen.err.splitlines() if line.startswith("espalier: ")]

    return run


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory) -> Path:
    """A run's prune folder: `model/` and `masks.safetensors`."""
    run_dir = tmp_path_factory.mktemp("pruned")
    with pytest.MonkeyPatch.context() as patch:
        settings = [*QUICK, "stages=[prune]", f"model={tiny_llama}", f"run_dir={run_dir}", "prune.sparsity=0.6"]
        patch.setattr(sys, "argv", ["launch.py", *settings])
        assert launch.main() == 0
    return run_dir / "prune"


def in_another_form(origin: Path, folder: Path, form: str) -> Path:
    model = AutoModelForCausalLM.from_pretrained(origin)
    if form == "bin":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="40KB" if form == "shards" else "1GB")
    return folder


@pytest.mark.parametrize("form", ["one file", "shards", "bin"])
def test_verify_accepts_a_pruned_model_in_any_format(pruned, tmp_path, typed, form):
    code, output, lines = typed(
        "verify", in_another_form(pruned / "model", tmp_path, form), pruned / "masks.safetensors"
    )
    assert (code, lines) == (0, [])
    (row,) = (line.split() for line in output.splitlines() if UP in line)
    assert row[1:4] == ["48", "x", "32"] and row[4] == "0.6"
    assert row[5:] == [f"{100 * 19 / 32:.2f}", f"{100 * 19 / 32:.2f}", "0"]  # int(32 * 0.6) of each row
    assert "21 matrices" in output and "no violations" in output
    assert model_files.identity(tmp_path) in output


def test_a_changed_weight_is_named(pruned, tmp_path, typed):
    folder = in_another_form(pruned / "model", tmp_path, "one file")
    weights = load_file(folder / "model.safetensors")
    row, column = (~Masks.load(pruned / "masks.safetensors")[UP]).nonzero()[7].tolist()
    weights[UP][row, column] = 0.25
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    code, output, (line,) = typed("verify", folder, pruned / "masks.safetensors")
    assert code == 2
    assert line == f"espalier: {folder} does not match its masks: {UP} [{row}, {column}] is 0.25 and should be zero"
    assert [line.split()[-1] for line in output.splitlines() if "weight" in line].count("1") == 1


def test_verify_refuses_the_dense_model(tiny_llama, pruned, typed):
    code, output, (line,) = typed("verify", tiny_llama, pruned / "masks.safetensors")
    assert code == 2 and "20 more matrices have problems" in line
    assert re.search(r"q_proj.weight \[\d+, \d+\] is \S+ and should be zero, and \d+ more of this matrix", line)


def test_a_mask_that_breaks_its_pattern(tiny_llama, tmp_path, typed):
    masks = Masks()
    masks.add(UP, torch.ones(48, 32, dtype=torch.bool), "2of4")
    masks.save(tmp_path / "masks.safetensors")
    code, _, (line,) = typed("verify", tiny_llama, tmp_path / "masks.safetensors")
    assert code == 2 and f"the mask of {UP}: " in line and "2of4" in line


@pytest.mark.parametrize("form", ["one file", "shards", "bin"])
def test_apply_reproduces_the_pruned_model(tiny_llama, pruned, tmp_path, typed, form):
    dense = in_another_form(tiny_llama, tmp_path / "dense", form)
    code, output, lines = typed("apply", dense, pruned / "masks.safetensors", tmp_path / "target")
    assert (code, lines) == (0, []) and "21 matrices masked" in output
    ours, theirs = (dict(model_files.tensors(folder)) for folder in (tmp_path / "target", pruned / "model"))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert weight.numpy().tobytes() == ours[name].numpy().tobytes(), name  # +0.0 too
    AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    index = json.loads((tmp_path / "target/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys()
    assert typed("verify", tmp_path / "target", pruned / "masks.safetensors")[0] == 0


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
@pytest.mark.slow
def test_transposed_matrices_and_experts(tmp_path, typed, family):
    """Transposed matrices, and experts, which old checkpoints store separately."""
    model, masks = small_model(family), Masks()
    model.save_pretrained(tmp_path / "dense")
    for name, matrix in matrices_of(model).items():
        mask_OI = torch.rand(matrix.weight_OI.shape) < 0.5
        stored = matrix.stored(mask_OI)
        masks.add(name, stored, "my_pattern.py", matrix.transposed)
    masks.save(tmp_path / "masks.safetensors")
    assert typed("verify", tmp_path / "dense", tmp_path / "masks.safetensors")[0] == 2
    assert typed("apply", tmp_path / "dense", tmp_path / "masks.safetensors", tmp_path / "target")[0] == 0
    assert typed("verify", tmp_path / "target", tmp_path / "masks.safetensors")[0] == 0


def test_wrong_arguments_are_one_line_errors(tiny_llama, pruned, tmp_path, typed):
    masks = pruned / "masks.safetensors"
    small_model("gpt2").save_pretrained(tmp_path / "other")
    (tmp_path / "there").mkdir()
    for words, says in [
        (["verify"], "2 paths are needed, 0 given: run `python launch.py verify MODEL_FOLDER MASKS_FILE`"),
        (["apply", tiny_llama, masks], "run `python launch.py apply MODEL_FOLDER MASKS_FILE TARGET_FOLDER`"),
        (["verify", tmp_path / "none", masks], "no model folder"),
        (["verify", tmp_path / "there", masks], "has no config.json"),
        (["verify", tiny_llama, tmp_path / "none"], "no mask file"),
        (["verify", tiny_llama, tiny_llama / "config.json"], "is not a mask file of this project"),
        (["verify", tmp_path / "other", masks], "another model's mask file?"),
        (["apply", tmp_path / "other", masks, tmp_path / "new"], "another model's mask file?"),
        (["apply", tiny_llama, masks, tmp_path / "there"], "exists already"),
    ]:
        code, _, lines = typed(*words)
        assert code == 2 and len(lines) == 1 and says in lines[0], (words, lines)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_processes_share_the_check_and_all_know_what_one_finds(pruned, tmp_path):
    folder, masks = pruned / "model", Masks.load(pruned / "masks.safetensors")
    alone = check_matrices(folder, masks, Recipe())
    assert [matrix.name for matrix in alone if matrix.violation] == []

    def work(rank: int) -> None:
        read, layers = [], verification.layers  # what this process reads
        verification.layers = lambda *args: (None, {n: _noted(n, f, read) for n, f in layers(*args)[1].items()})
        found = [str(matrix) for matrix in check_matrices(folder, masks, Recipe())]
        (tmp_path / f"{rank}.json").write_text(json.dumps([read, found]))

    launches.run((f"model={folder}", "stages=[prune]"), tmp_path / "log", of=2, work=work)
    (first, told), (second, also_told) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert told == also_told == [str(matrix) for matrix in alone]
    assert first and second and not set(first) & set(second)


def _noted(name: str, read, noted: list):
    def reads():
        noted.append(name)
        return read()

    return reads
