"""Runs on simulated GPUs, which refuse what real GPUs refuse and count copies, bytes and collectives exactly."""

import json

import pytest
import torch

from pipeline.models import model_files
from pipeline.registry import PRUNE_METHODS
from pipeline.sparsity.masks import Masks
from tests.conftest import PRUNE, QUICK, llama_config

pytestmark = pytest.mark.slow
RUN = (*QUICK, "stages=[prune,finetune]", "prune.method=sparsegpt")


def test_a_trained_model_stays_on_its_gpu_until_it_is_written(half_llama, simulated, tmp_path):
    """Lightning moves the model and the optimizer to the host after training."""
    settings = (*RUN, f"model={half_llama}", f"run_dir={tmp_path}", "finetune.rank=1", "finetune.checkpoint_every=100")
    simulated(*settings, "stages=[prune]")
    (counts,) = simulated(*settings)
    model = dict(model_files.tensors(tmp_path / "finetune/model"))
    assert {tensor.dtype for tensor in model.values()} == {torch.float16}
    # the merged matrices, and one checkpoint with the adapter and its optimizer; with Lightning's teardown, 2.3 times the model
    assert counts["d2h_bytes"] < sum(tensor.nbytes for tensor in model.values()), counts


def test_masks_do_not_depend_on_the_number_of_gpus_or_their_visibility(half_llama, simulated, tmp_path):
    launches = {"one": {}, "two": {"processes": 2}, "tasks": {"processes": 2, "visible": ("a", "b")}}
    masks = []
    for name, launch in launches.items():
        counts = simulated(*RUN, f"model={half_llama}", f"run_dir={tmp_path / name}", "stages=[prune]", **launch)
        masks.append((tmp_path / name / "prune/masks.safetensors").read_bytes())
        if launch:  # objects and barriers use gloo, on the host
            assert all(rank["collectives"]["host"] > 10 for rank in counts), counts
    assert masks[0] == masks[1] == masks[2]


def test_full_fine_tuning_is_sharded_over_two_gpus(half_llama, simulated, tmp_path):
    """With FSDP, weights are gathered in bfloat16, stored in float32 and merged on the GPUs."""
    more = ("finetune.method=full", "finetune.strategy=fsdp", "prune.method=wanda")
    settings = (*RUN, f"model={half_llama}", f"run_dir={tmp_path}", *more)
    simulated(*settings, "stages=[prune]")
    counts = simulated(*settings, processes=2)
    assert all(rank["collectives"]["_allgather_base"] for rank in counts)
    # rank 1 writes no files, so only scalars leave its GPU; Lightning's teardown copied its shards and optimizer to the host
    assert counts[1]["d2h_bytes"] < 8000, counts[1]


def test_training_memory_is_freed_before_the_evaluation(half_llama, simulated, tmp_path):
    """The model, its gradients in DDP's buckets, and the optimizer. 12 bytes per weight were not freed."""
    few = ("evaluate.windows=2", "evaluate.continuations=0", "finetune.method=full", "stages=[prune,finetune,evaluate]")
    counts = simulated(*RUN, f"model={half_llama}", f"run_dir={tmp_path}", *few, processes=2)
    assert all("gradients as views: True" in rank["output"] for rank in counts)
    assert [rank["now"] for rank in counts] == [0, 0], counts


def test_full_fine_tuning_takes_16_bytes_per_weight(simulated, tmp_path):
    """Weights, gradients and two moments in float32. It was 21 with the optimizer's temporaries, with gradients kept during the
    next forward, and with masks of a byte per weight."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.data import world

    tokenizer = world.tokenizer()
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).to(torch.float16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    few = ("finetune.method=full", "finetune.batch_size=1", "finetune.seq_len=8", "finetune.max_steps=2")
    (counts,) = simulated(
        *RUN, "prune.method=wanda", *few, f"model={tmp_path / 'model'}", f"run_dir={tmp_path / 'run'}"
    )
    assert counts["peak"] / sum(parameter.numel() for parameter in model.parameters()) < 16.6


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A function that saves a float16 Llama of a number of layers; returns its folder and the bytes of a layer."""
    from transformers import LlamaForCausalLM

    from pipeline.data import world

    tokenizer, where = world.tokenizer(), tmp_path_factory.mktemp("deep")

    def make(layers: int, width: int = 128):
        config = llama_config(len(tokenizer), num_hidden_layers=layers, hidden_size=width, intermediate_size=2 * width)
        model, folder = LlamaForCausalLM(config).to(torch.float16), where / f"{layers}-{width}"
        if not folder.exists():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder, sum(parameter.nbytes for parameter in model.model.layers[0].parameters())

    return make


def test_what_a_frozen_weight_takes_in_lora_with_fsdp(deep, simulated, tmp_path):
    """Beside its shard: a bit for the mask, and no 16-bit copy for backward. The difference of five and three layers."""
    few = ("finetune.seq_len=4", "finetune.batch_size=1", "finetune.accumulate=2", "finetune.max_steps=2")
    few += ("finetune.checkpoint_activations=true", "finetune.rank=1", "finetune.strategy=fsdp")
    peaks, trained = [], []
    for layers in (3, 5):
        folder, layer_bytes = deep(layers, 512)
        run_dir = tmp_path / str(layers)
        counts = simulated(*RUN, "prune.method=magnitude", *few, f"run_dir={run_dir}", f"model={folder}", processes=2)
        peaks.append([rank["peak"] for rank in counts])
        trained.append(sum(sum(mask.shape) for mask in Masks.load(run_dir / "prune/masks.safetensors").packed.values()))
    adapter = (
        16 * (trained[1] - trained[0]) / 2 / 2
    )  # of a layer: weights, gradients and two moments, on one of two GPUs
    for three, five in zip(*peaks):
        taken = ((five - three) / 2 - adapter) / (layer_bytes / 2)
        assert 1.1 < taken < 1.15, (peaks, adapter)  # a shard is half of 2 bytes


# Launches for the 8 forward passes of a layer (4 batches, twice) with the sums over the inputs, and for its 7 matrices.
# Synchronisations: the numbers and the masks are read once each; SparseGPT also reads whether its 4 factors succeeded.
LAYER = {"wanda": (2, 830), "sparsegpt": (6, 6100)}  # synchronisations, launches


@pytest.mark.parametrize(("method", "processes"), [("wanda", 2), ("sparsegpt", 1)])
def test_what_a_layer_of_the_walk_takes(deep, simulated, tmp_path, method, processes):
    """The difference of five and three layers. It was 80 synchronisations for Wanda, 242 for SparseGPT."""
    found = []
    for layers in (3, 5):
        folder, layer_bytes = deep(layers)
        chosen = (f"prune.method={method}", f"run_dir={tmp_path}/{layers}")
        found.append(simulated(*PRUNE, *chosen, f"model={folder}", processes=processes))
    syncs, launches = LAYER[method]
    for few, more in zip(*found):
        layer = {name: (more[name] - few[name]) / 2 for name in ("syncs", "launches", "d2h_bytes", "h2d_bytes")}
        assert layer["syncs"] == syncs and layer["launches"] <= launches, layer
        assert layer["h2d_bytes"] == layer_bytes, layer  # the weights, once, on every GPU
        # the weights once, on one GPU, a bit per weight, and 8 bytes for each number
        masks = layer_bytes / 16 + 100 * 8
        assert layer["d2h_bytes"] <= layer_bytes * (1 if processes == 1 else 0.5) + masks, layer
    # what was read ahead are the layers' weights
    dense, masks = dict(model_files.tensors(folder)), Masks.load(tmp_path / "5/prune/masks.safetensors")
    for name, weight in model_files.tensors(tmp_path / "5/prune/model"):
        if method != "sparsegpt":
            assert torch.equal(weight, dense[name] * masks[name] if name in masks else dense[name]), name


@pytest.mark.parametrize(
    "cells, number",
    [
        ((f"prune.method={','.join(PRUNE_METHODS.entries)}", "prune.sparsity=0.5"), len(PRUNE_METHODS.entries)),
        (("prune.refine=dsnot,swaps", "prune.update=admm,least_squares", "prune.sparsity=2of4"), 4),
    ],
)
def test_all_methods_run_on_a_gpu(half_llama, simulated, tmp_path, cells, number):
    few = ("calibration.samples=4", "calibration.seq_len=16")
    simulated(*PRUNE, f"model={half_llama}", f"run_dir={tmp_path / 'runs'}", *few, *cells)
    found = list(tmp_path.glob("runs/*/prune/masks.safetensors"))
    assert len(found) == number
    for path in found:
        Masks.load(path).check_patterns()


def test_a_quantised_model_is_trained_and_a_streamed_one_is_measured(half_llama, simulated, tmp_path):
    few = ("stages=[prune,finetune,evaluate]", "finetune.max_steps=1", "evaluate.windows=2", "evaluate.continuations=0")
    more = ("finetune.quantize=nf4", "evaluate.placement=stream")
    simulated(*RUN, f"model={half_llama}", f"run_dir={tmp_path}", "prune.method=wanda", *few, *more)
    models = json.loads((tmp_path / "evaluate/results.json").read_text())["models"]
    assert models["finetuned"]["mask_violations"] == 0
