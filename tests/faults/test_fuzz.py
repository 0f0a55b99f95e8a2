"""Random settings and random damage of file headers give a message and no crash."""

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from pipeline.models import loading
from pipeline.runtime.errors import UserError
from pipeline.settings import reader, schema
from pipeline.sparsity import masks

pytestmark = pytest.mark.slow

KEYS = [*schema.plain(reader.load([]))["prune"], "x"]
VALUES = some.one_of(
    some.text(max_size=20), some.integers().map(str), some.floats().map(str), some.sampled_from(["[", "{a: b}", "null"])
)
QUICKLY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@QUICKLY
@given(
    some.sampled_from(
        [f"prune.{k}" for k in KEYS] + ["seed", "stages", "finetune.lr", "model", "evaluate.tasks", "prune"]
    ),
    VALUES,
)
def test_random_settings(key, value):
    try:
        reader.load([f"{key}={value}"])
    except UserError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def mine(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(tiny_llama, folder)
    return folder, (tiny_llama / "model.safetensors").read_bytes()


@settings(QUICKLY, max_examples=40)
@given(some.integers(0, 3000), some.integers(0, 255))
def test_random_damage_of_file_headers(mine, where, byte):
    folder, whole = mine
    content = bytearray(whole)
    content[where] = byte
    (folder / "model.safetensors").write_bytes(content)
    asked = reader.load([f"model={folder}", "stages=[prune]"])
    for read in (lambda: loading.load(folder, asked), lambda: masks.Masks.load(folder / "model.safetensors")):
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error)
