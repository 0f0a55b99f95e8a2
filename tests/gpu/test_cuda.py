"""Runs on a real CUDA GPU: `pytest -m gpu`. The same laws as on the CPU, and agreement with it where rounding allows."""

import copy
import csv
import itertools
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import api
from pipeline.models import model_files
from pipeline.registry import FINETUNE_METHODS, PRUNE_METHODS, REFINEMENTS, UPDATES
from pipeline.registry.entry import NONE
from pipeline.runtime import memory
from pipeline.sparsity.masks import Masks
from tests import families
from tests.conftest import QUICK, ROOT, command, environment, typing
from tests.engine import test_models, walking

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
TRAIN = ("stages=[prune,finetune]", "prune.sparsity=2of4")
COMBINATIONS = [(method, NONE, NONE) for method in PRUNE_METHODS.entries if method != "wanda"]
COMBINATIONS += [("wanda", *pair) for pair in itertools.product(REFINEMENTS.entries, UPDATES.entries)]
RECOVERIES = [
    (name, quantize)
    for name, entry in FINETUNE_METHODS.entries.items()
    for quantize in (None, "nf4", "int8")
    if quantize is None or "quantize" in entry.reads
]


@pytest.fixture
def started(tiny_llama, tmp_path, monkeypatch, capsys):
    return typing((*QUICK, f"model={tiny_llama}", f"run_dir={tmp_path / 'run'}"), monkeypatch, capsys)


def pruned(folder: Path, device: str, **settings) -> Masks:
    """The masks of a model that is loaded from the folder in float32 and pruned on the device."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return api.prune(model, tokenizer, calibration="world", samples=8, seq_len=32, batch_size=2, **settings)


def disagreement(one: Masks, other: Masks) -> float:
    """The share of the weights whose bits differ."""
    weights = [(one[name], other[name]) for name in one]
    return sum(int((a != b).sum()) for a, b in weights) / sum(a.numel() for a, _ in weights)


def stored(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*.safetensors")}


def check_model(run_dir: Path) -> None:
    """The masks hold their pattern, and the fine-tuned weights are finite, and zero outside the masks."""
    masks = Masks.load(run_dir / "prune/masks.safetensors")
    masks.check_patterns()
    for name, weight in model_files.tensors(run_dir / "finetune/model"):
        assert weight.isfinite().all(), name
        assert name not in masks or not weight[~masks[name]].any(), name


@pytest.mark.parametrize("sparsity", ("2of4", "0.5"))
@pytest.mark.parametrize("method, refine, update", COMBINATIONS)
def test_masks_are_those_of_the_cpu_but_for_rounding(tiny_llama, method, refine, update, sparsity):
    settings = {"method": method, "sparsity": sparsity, "refine": refine, "update": update}
    on_cpu, on_gpu = (pruned(tiny_llama, device, **settings) for device in ("cpu", "cuda"))
    on_gpu.check_patterns()
    # methods that update weights, and whose masks depend on the updated weights, differ more than scores
    assert disagreement(on_cpu, on_gpu) < 0.02


@pytest.mark.parametrize("name", test_models.KINDS)
def test_block_by_block_equals_the_model(name):
    device = torch.device("cuda")
    batches = [batch.to(device) for batch in test_models.BATCHES]
    assert walking.difference(families.tiny(name).to(device), batches, device) is None


@pytest.mark.parametrize("hidden_states", ("gpu", "cpu"))
def test_masks_do_not_depend_on_where_hidden_states_wait(started, tmp_path, hidden_states):
    for where in ("auto", hidden_states):
        code, _, lines = started("stages=[prune]", f"prune.hidden_states={where}", f"run_dir={tmp_path / where}")
        assert code == 0, lines
    assert stored(tmp_path / "auto") == stored(tmp_path / hidden_states)


def test_the_command_runs_all_stages(started, tmp_path):
    stages = "stages=[prune,reconstruct,finetune,evaluate,export,speed,report]"
    few = (
        "reconstruct.epochs=1",
        "reconstruct.accumulate=1",
        "speed.repeats=1",
        "speed.new_tokens=4",
        "speed.prompt_lengths=[16]",
        "speed.batches=[1]",
    )
    code, output, lines = started(stages, *few)
    assert code == 0, (output, lines)
    check_model(tmp_path / "run")
    assert (tmp_path / "run/report/report.html").is_file()


@pytest.mark.parametrize("source", ("tiny_llama", "half_llama"))
@pytest.mark.parametrize("method, quantize", RECOVERIES)
def test_recovery_keeps_the_masks(request, started, tmp_path, method, quantize, source):
    """From float32 and float16 checkpoints. The stage itself checks the merged weights."""
    more = [f"model={request.getfixturevalue(source)}", f"finetune.method={method}"]
    more += [f"finetune.quantize={quantize}"] if quantize else []
    code, output, lines = started(*TRAIN, *more)
    assert code == 0, (output, lines)
    with open(tmp_path / "run/finetune/metrics.csv", newline="") as file:
        assert all(math.isfinite(float(row["loss"])) for row in csv.DictReader(file))
    if FINETUNE_METHODS.entry(method).leaves_model:
        check_model(tmp_path / "run")


@pytest.mark.parametrize("method", ("lora", "full"))
def test_killed_and_resumed_equals_uninterrupted(tiny_llama, tmp_path, method):
    """With deterministic=true; kill -9 after a checkpoint."""
    variables = {name: value for name, value in environment().items() if name != "CUDA_VISIBLE_DEVICES"}
    settings = (*QUICK, *TRAIN, "finetune.max_steps=200", "finetune.checkpoint_every=20", "deterministic=true")
    settings += (f"model={tiny_llama}", f"finetune.method={method}")

    def start(run_dir: Path) -> subprocess.Popen:
        log = open(tmp_path / f"{run_dir.name}.txt", "ab")  # noqa: SIM115
        return subprocess.Popen(
            command(*settings, f"run_dir={run_dir}"),
            cwd=ROOT,
            env=variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    assert start(tmp_path / "whole").wait(200) == 0, (tmp_path / "whole.txt").read_text()[-3000:]
    killed, log = start(tmp_path / "killed"), tmp_path / "killed.txt"
    while killed.poll() is None and not re.search(r"step (2[1-9]|[3-9]\d)", log.read_text()):
        time.sleep(0.02)
    if killed.poll() is None:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    assert start(tmp_path / "killed").wait(200) == 0, log.read_text()[-3000:]
    assert stored(tmp_path / "whole") == stored(tmp_path / "killed")


def test_too_little_gpu_memory_names_the_key(started, tmp_path):
    small = 64 << 20  # bytes that this process may take
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(small / torch.cuda.mem_get_info()[1])
    try:
        more = ("finetune.batch_size=4096", "finetune.seq_len=128", "finetune.max_steps=1", "finetune.accumulate=1")
        code, _, lines = started(*TRAIN, *more)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert code == 2 and len(lines) == 1, lines
    assert "finetune stage" in lines[0] and "set finetune.batch_size=" in lines[0]


def test_nothing_stays_on_the_gpu(started):
    code, _, lines = started("stages=[prune,finetune,evaluate]")
    assert code == 0, lines
    assert memory.peak_gib(torch.device("cuda")) > 0
    torch._C._cuda_clearCublasWorkspaces()  # 32 MiB, which torch's allocator counts
    assert torch.cuda.memory_allocated() < 1 << 16


def test_evaluation_agrees_with_the_cpu(tiny_llama):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    settings = {"perplexity": ["world"], "seq_len": 64, "batch_size": 2}
    on_cpu = api.evaluate(copy.deepcopy(model), tokenizer, **settings)
    on_gpu = api.evaluate(model.cuda(), tokenizer, **settings)
    assert on_gpu["perplexity"]["world"] == pytest.approx(on_cpu["perplexity"]["world"], rel=1e-4)
