"""deterministic=true holds while a stage trains, and an operation that cannot is named."""

import os

import pytest
import torch

from pipeline.runtime import deterministic
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.stages import finetune, prune
from tests.conftest import QUICK


def test_training_is_deterministic_and_what_is_not_training_is_left_alone(tiny_llama, tmp_path, monkeypatch):
    recipe = reader.load([*QUICK, f"model={tiny_llama}", "deterministic=true"])
    seen, train = [], finetune.train

    def noted(*args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return train(*args)

    monkeypatch.setattr(finetune, "train", noted)
    for stage, inputs in ((prune, {}), (finetune, {"prune": tmp_path / "prune"})):
        folder = tmp_path / stage.__name__.rpartition(".")[2]
        folder.mkdir()
        stage.run(recipe, folder, inputs)
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_cannot_is_named():
    with pytest.raises(UserError, match="set deterministic=false: kthvalue CUDA"), deterministic.training(True):
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation, but you set")
    assert not torch.are_deterministic_algorithms_enabled()


def test_cublas_is_told_before_it_starts_and_only_if_asked(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    deterministic.prepare(False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    deterministic.prepare(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
