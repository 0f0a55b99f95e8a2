"""What a run does on GPUs, counted on simulated ones: they refuse what real ones refuse, and counts do not vary."""

import pytest
import torch

from pipeline.models import model_files
from tests.conftest import QUICK

pytestmark = pytest.mark.slow
RUN = (*QUICK, "stages=[prune,finetune]", "prune.method=sparsegpt")


@pytest.fixture(scope="module")
def half_llama(tiny_llama, tmp_path_factory):
    """As LLaMA and OPT are stored."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("half")
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).save_pretrained(folder)
    for path in tiny_llama.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_trained_model_stays_on_its_gpu_until_it_is_written(half_llama, simulated, tmp_path):
    """Lightning would take model and optimizer to the host, where they would be merged and checked."""
    settings = (*RUN, f"model={half_llama}", f"run_dir={tmp_path}", "finetune.rank=1", "finetune.checkpoint_every=100")
    simulated(*settings, "stages=[prune]")
    (counts,) = simulated(*settings)
    model = dict(model_files.tensors(tmp_path / "finetune/model"))
    assert {tensor.dtype for tensor in model.values()} == {torch.float16}
    # merged matrices, and the adapter with its optimizer in one checkpoint; it was 2.3 times the model
    assert counts["d2h_bytes"] < sum(tensor.nbytes for tensor in model.values()), counts


def test_masks_are_those_of_one_gpu_on_two_and_with_one_for_each_task(half_llama, simulated, tmp_path):
    launches = {"one": {}, "two": {"processes": 2}, "tasks": {"processes": 2, "visible": ("a", "b")}}
    masks = []
    for name, launch in launches.items():
        counts = simulated(*RUN, f"model={half_llama}", f"run_dir={tmp_path / name}", "stages=[prune]", **launch)
        masks.append((tmp_path / name / "prune/masks.safetensors").read_bytes())
        if launch:  # what is told and waited for goes by gloo, on the host
            assert all(rank["collectives"]["host"] > 10 for rank in counts), counts
    assert masks[0] == masks[1] == masks[2]


def test_two_gpus_train_whole_weights_shared_out(half_llama, simulated, tmp_path):
    """Full fine-tuning under FSDP: gathered in bfloat16, kept in float32, merged where it trained."""
    more = ("finetune.method=full", "finetune.strategy=fsdp", "prune.method=wanda")
    counts = simulated(*RUN, f"model={half_llama}", f"run_dir={tmp_path}", *more, processes=2)
    assert all(rank["collectives"]["_allgather_base"] for rank in counts)
    # rank 1 writes nothing, so little but numbers leaves its GPU: Lightning took its shards and their optimizer to the host
    assert counts[1]["d2h_bytes"] < 8000, counts[1]


def test_what_was_trained_is_freed_before_it_is_evaluated(half_llama, simulated, tmp_path):
    """The model, its gradients in DDP's buckets, and the optimizer: 12 bytes a weight stayed."""
    few = ("evaluate.windows=2", "evaluate.continuations=0", "finetune.method=full", "stages=[prune,finetune,evaluate]")
    counts = simulated(*RUN, f"model={half_llama}", f"run_dir={tmp_path}", *few, processes=2)
    assert all("gradients as views: True" in rank["said"] for rank in counts)
    assert [rank["now"] for rank in counts] == [0, 0], counts


def test_full_fine_tuning_takes_16_bytes_a_weight(simulated, tmp_path):
    """Weights, gradients and two moments in float32: no temporaries of the optimizer, no gradients kept through the next
    forward beside autocast's copies, masks at a bit a weight. It was 21."""
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
