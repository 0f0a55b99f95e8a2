"""The dtypes in which weights are stored, gathered and used."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from pipeline.engine.blocks import find_blocks
from pipeline.models import model_files
from pipeline.recovery import sharding
from pipeline.recovery.training_dtype import frozen_dtype, precision, weights_dtype
from pipeline.runtime import checksums, processes
from pipeline.runtime.errors import UserError
from pipeline.settings import reader, schema
from pipeline.stages import finetune, preflight, prune
from tests.conftest import QUICK


def settings(model, *more):
    return reader.load([*QUICK, f"model={model}", *more])


def test_a_float16_checkpoint_trains_in_bfloat16_and_ends_in_float16(half_llama, tmp_path):
    recipe = settings(half_llama, "finetune.precision=bf16-mixed")
    model = finetune.load(half_llama, recipe)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    dtypes = []
    for block in find_blocks(model):
        block.module.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(8)[None])
    assert set(dtypes) == {torch.bfloat16}  # with float16 norms the residual stream would be float32

    (tmp_path / "prune").mkdir()
    prune.run(recipe, tmp_path / "prune", {})
    finetune.run(recipe, tmp_path / "finetune", {"prune": tmp_path / "prune"})
    written = dict(model_files.tensors(tmp_path / "finetune/model"))
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}


@pytest.mark.parametrize(
    "precision, stored, loaded",
    [
        ("bf16-mixed", "float16", "bfloat16"),
        ("16-mixed", "bfloat16", "float16"),
        ("bf16-mixed", "bfloat16", None),
        ("bf16-mixed", "float32", None),  # dtype=bfloat16 would convert it
        ("32-true", "float16", None),
        ("bf16-true", "float16", None),  # Lightning converts the whole model
    ],
)
def test_only_the_other_16_bit_dtype_is_converted(precision, stored, loaded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = f"finetune.precision={precision}"
    assert frozen_dtype(settings("m", given).finetune, stored) == loaded
    assert weights_dtype(settings("m", given).finetune, stored) == loaded  # a LoRA's base is frozen
    trained = None if precision == "bf16-true" else "float32"
    assert weights_dtype(settings("m", given, "finetune.method=full").finetune, stored) == trained


def test_a_gpu_that_only_emulates_bfloat16_trains_in_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, expected in ((7, "16-mixed"), (8, "bf16-mixed")):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, m=major: SimpleNamespace(major=m))
        assert precision("auto") == expected


def test_float16_needs_a_gpu(tiny_llama, monkeypatch):
    """Lightning would train in bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = reader.load(["recipe=tiny", "finetune.precision=16-mixed"])  # whose model is trained by the run
    for recipe in (small, settings(tiny_llama, "stages=[prune,finetune]", "finetune.precision=16-mixed")):
        with pytest.raises(UserError, match="16-mixed needs a GPU.* set finetune.precision=bf16-mixed"):
            preflight.check(recipe)


def test_a_finished_training_may_be_evaluated_without_its_gpu(tiny_llama, tmp_path, monkeypatch):
    """The same command was refused on a machine without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    same = (tiny_llama, f"run_dir={tmp_path}", "finetune.precision=16-mixed")
    checksums.write(tmp_path / "finetune", {"recipe": schema.plain(settings(*same))})
    preflight.check(settings(*same))
    for more in ("rerun=[finetune]", "finetune.max_steps=7", f"model={tmp_path}"):
        with pytest.raises(UserError, match="16-mixed needs a GPU"):
            preflight.check(settings(*same, more))


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_weights_are_kept_in_float32_and_gathered_in_bfloat16(half_llama, mesh):
    """Under autocast alone, each GPU would keep unsharded bfloat16 copies of all weights for backward."""
    model = AutoModelForCausalLM.from_pretrained(half_llama, dtype="auto")
    original = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    sharding.shard_(model, mesh, torch.bfloat16, float32=True)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter.full_tensor(), original[name])
    dtypes = []
    up_proj = model.model.layers[0].mlp.up_proj
    up_proj.register_forward_pre_hook(lambda module, args: dtypes.append(module.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(8)[None]).logits.float().sum().backward()
    assert dtypes == [torch.bfloat16]
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_only_rank_0_keeps_the_gathered_weights(half_llama, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(half_llama)
    assert sharding.gather_trained(model).keys() == dict(model.named_parameters()).keys()
    monkeypatch.setattr(processes, "is_main", lambda: False)
    assert sharding.gather_trained(model) == {}
