"""deterministic=true applies while a stage trains; an operation without a deterministic form is named."""

import os

import pytest
import torch

from pipeline.runtime import deterministic
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.stages import finetune, prune
from tests.conftest import QUICK


def test_only_training_is_deterministic(tiny_llama, tmp_path, monkeypatch):
    recipe = reader.load([*QUICK, f"model={tiny_llama}", "deterministic=true"])
    enabled, train = [], finetune.train

    def recording_train(*args):
        enabled.append(torch.are_deterministic_algorithms_enabled())
        return train(*args)

    monkeypatch.setattr(finetune, "train", recording_train)
    for stage, inputs in ((prune, {}), (finetune, {"prune": tmp_path / "prune"})):
        folder = tmp_path / stage.__name__.rpartition(".")[2]
        folder.mkdir()
        stage.run(recipe, folder, inputs)
    assert enabled == [True] and not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_form_is_named():
    with pytest.raises(UserError, match="set deterministic=false: kthvalue CUDA"), deterministic.training(True):
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation, but you set")
    assert not torch.are_deterministic_algorithms_enabled()


def test_cublas_is_configured_only_if_deterministic(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    deterministic.prepare(False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    deterministic.prepare(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
