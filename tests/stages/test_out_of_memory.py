"""A stage that runs out of memory names the key to change; the memory plan and the checkpoint interval."""

import pytest
import torch

from callbacks.checkpointer import Checkpointer
from pipeline.engine import walk_memory
from pipeline.engine.blocks import find_blocks
from pipeline.engine.matrices import matrices
from pipeline.pruning.combination import prune_method
from pipeline.pruning.obs_methods import SparseGpt
from pipeline.pruning.score_methods import Wanda
from pipeline.runtime import memory
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.settings.schema import Prune
from pipeline.stages import out_of_memory, prune
from tests.conftest import QUICK
from tests.engine.test_decoder import small_model

LOW_MEMORY = ["finetune.batch_size=1", "finetune.checkpoint_activations=true"]


@pytest.mark.parametrize(
    "stage, more, key",
    [
        ("prune", [], "calibration.batch_size=1"),
        ("prune", ["calibration.batch_size=1"], "calibration.seq_len=16"),
        ("finetune", [], "finetune.batch_size=2 finetune.accumulate=2"),
        ("finetune", LOW_MEMORY[:1], "finetune.checkpoint_activations=true"),
        ("finetune", LOW_MEMORY, "finetune.quantize=nf4"),
        ("finetune", [*LOW_MEMORY, "finetune.method=full"], "finetune.seq_len=16"),
        ("evaluate", [], "evaluate.batch_size=1"),
        ("speed", [], r"speed.batches=\[1\] speed.prompt_lengths=\[\]"),
    ],
)
def test_one_line_says_which_key_to_change(tiny_llama, stage, more, key):
    recipe = reader.load([*QUICK, f"model={tiny_llama}", *more])
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("cuBLAS: ALLOC_FAILED")):
        line = f"{stage} stage: this machine has too little memory: set {key} "
        with pytest.raises(UserError, match=line), out_of_memory.as_user_error(stage, recipe):
            raise error
    with pytest.raises(RuntimeError, match="another"), out_of_memory.as_user_error(stage, recipe):
        raise RuntimeError("another")


@pytest.mark.parametrize("stage", ["export", "report", "speed"])
def test_a_line_names_no_key_that_would_not_help(tiny_llama, stage):
    recipe = reader.load([*QUICK, f"model={tiny_llama}", "speed.batches=[1]"])
    with (
        pytest.raises(UserError, match="repeat the command where there is more"),
        out_of_memory.as_user_error(stage, recipe),
    ):
        raise MemoryError


def test_the_command_ends_in_that_line(tiny_llama, tmp_path, refused, monkeypatch):
    def run_out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prune, "run", run_out)
    assert "set calibration.batch_size=1" in refused(tmp_path, f"model={tiny_llama}")


def test_gram_matrices_are_counted(capsys):
    """Gram matrices in float64 in bands (attention, gate and up, down), six float32 matrices for a factor, copies of rows."""
    model = small_model("llama")
    blocks = find_blocks(model)
    inner, hidden = blocks[0].module.mlp.up_proj.weight.shape
    batches, planned = [torch.zeros(1, 8, dtype=torch.int32)], []
    for method in (Wanda(Prune(), {}), SparseGpt(Prune(), {}), prune_method(Prune(update="admm"), {})):
        prune.plan_memory(model, batches, method)
        found = matrices(blocks[0], blocks)
        planned.append(walk_memory._pruning_gib(found, method.observe, method.copies) * memory.GIB)
    sums, both = 8 * (2 * hidden**2 + inner**2), 4 * 2 * inner * hidden  # one band at this size; gate and up in float32
    factors = [24 * hidden**2, 24 * inner**2]
    assert planned[0] == 8 * (2 * hidden + inner) + 2 * both
    assert planned[1] == sums + max(factors[0] + 3 * both, factors[1] + 3 * both / 2)
    assert planned[2] == sums + max(factors[0] + 4 * both, factors[1] + 4 * both / 2)
    assert "to compute with" in capsys.readouterr().out


def test_slow_checkpoints_take_a_twentieth_of_the_training_time(tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr("callbacks.checkpointer.time.monotonic", lambda: now[0])

    class Trainer:
        global_step, max_steps, should_stop = 0, 60, False

        def save_checkpoint(self, path, weights_only):
            saved.append(self.global_step)
            now[0] += self.seconds

    for seconds, expected in ((1.0, list(range(2, 61, 2))), (30.0, [2, 22, 42, 60])):
        trainer, saver = Trainer(), Checkpointer(tmp_path, every=2)
        trainer.seconds = seconds
        saved.clear()
        saver.on_train_start(trainer, None)
        for step in range(1, 61):
            trainer.global_step = step
            now[0] += 30.0
            saver.on_train_batch_end(trainer, None, None, None, 0)
        assert saved == expected
