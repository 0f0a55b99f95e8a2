"""A resumed training equals an uninterrupted one bit for bit; a step is the same on any number of processes."""

import random

import pytest
import torch
from lightning import Callback
from torch import nn

from callbacks import of_training
from callbacks.mask_keeper import MaskKeeper
from callbacks.validation import Validation
from pipeline.recovery import training
from pipeline.recovery.held_out import HeldOut
from pipeline.recovery.methods import SparseFull
from pipeline.recovery.training import batch_per_process
from pipeline.runtime import checksums
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune
from pipeline.sparsity.masks import Masks
from tests.engine.test_decoder import small_model
from tests.recovery.test_lora import with_masks

WINDOWS = torch.randint(3, 61, (10 * 4, 16), generator=torch.Generator().manual_seed(1))


def schedule(**more) -> Finetune:
    usual = dict(
        max_steps=10, batch_size=2, accumulate=2, lr=1e-2, warmup=0.2, weight_decay=0.01, clip=1.0, checkpoint_every=2
    )
    return Finetune(**usual | more)


def fit(model, windows_NT, settings, seed, folder, callbacks=(), validation=None):
    callbacks = [*callbacks, *of_training(folder, settings.checkpoint_every, validation)]
    training.fit(model, windows_NT, settings, seed, folder, callbacks)


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if index == self.batch:
            raise Killed


def with_dropout() -> nn.Module:
    model = small_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2  # a resume must reproduce the random numbers in forward
    return model


@pytest.mark.parametrize("batch", sorted(random.Random(0).sample(range(20), 10)))
@pytest.mark.slow
def test_a_killed_and_resumed_training_equals_an_uninterrupted_one(tmp_path, batch):
    whole, broken = with_dropout(), with_dropout()
    fit(whole, WINDOWS, schedule(), 0, tmp_path / "whole")
    with pytest.raises(Killed):
        fit(broken, WINDOWS, schedule(), 0, tmp_path / "broken", [KillAt(batch)])
    resumed = with_dropout()
    fit(resumed, WINDOWS, schedule(), 0, tmp_path / "broken")
    for (name, expected), value in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(value, expected), name
    one, two = (
        [row.split(",")[:3] for row in (tmp_path / which / "metrics.csv").read_text().splitlines()]
        for which in ("whole", "broken")
    )
    assert one == two
    assert len(one) == 1 + 10


def test_checkpoints_hold_only_trained_parameters(tmp_path):
    model = small_model("llama")
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, WINDOWS, schedule(), 0, tmp_path)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert list(state) == ["model.model.layers.0.mlp.up_proj.weight"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.layers.0.mlp.up_proj.weight"}


class Counted(SparseFull):
    """Counts the calls of `reapply`, and the gradients of pruned weights that reach the clipping."""

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        super().__init__(model, masks, Finetune(method="full"))
        self.reapplied = self.seen = 0

    def reapply(self) -> int:
        self.reapplied += 1
        return super().reapply()

    def mask_gradients(self) -> None:
        super().mask_gradients()
        for name, mask in self.masks.items():
            self.seen += int(self.model.get_parameter(name).grad[~mask].count_nonzero())


def test_masks_are_reapplied_once_per_real_step_and_before_clipping(tmp_path):
    recovery = Counted(*with_masks(small_model("llama")))
    keeper = MaskKeeper(recovery)
    windows = WINDOWS[: 5 * 2 * 4]
    fit(recovery.model, windows, schedule(max_steps=5, accumulate=4, clip=0.1), 0, tmp_path, [keeper])
    assert keeper.steps == 5
    assert recovery.reapplied == 5 + 1  # and once at the start
    assert recovery.seen == 0


def test_a_step_the_scaler_skips_is_not_counted():
    recovery = Counted(*with_masks(small_model("llama")))
    optimizer = torch.optim.AdamW(recovery.model.parameters())
    keeper = MaskKeeper(recovery)
    trainer = type("", (), {"optimizers": [optimizer]})()
    keeper.on_train_start(trainer, None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(7):
        optimizer.zero_grad()
        loss = recovery.model(input_ids=WINDOWS[:2], labels=WINDOWS[:2]).loss * (torch.inf if step in (1, 4) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert keeper.steps == 5
    assert recovery.reapplied == 5 + 1
    keeper.teardown(trainer, None, "fit")
    optimizer.step()
    assert keeper.steps == 5


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.slow
def test_bitsandbytes_optimizers_keep_masks_and_resume_exactly(tmp_path, optimizer):
    chosen = schedule(optimizer=optimizer)
    wide = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes keeps tensors below 4096 weights in float32
    whole, broken, resumed = (SparseFull(*with_masks(small_model("llama", **wide)), chosen) for _ in range(3))
    keeper = MaskKeeper(whole)
    fit(whole.model, WINDOWS, chosen, 0, tmp_path / "whole", [keeper])
    assert keeper.steps == 10
    with pytest.raises(Killed):
        fit(broken.model, WINDOWS, chosen, 0, tmp_path / "broken", [MaskKeeper(broken), KillAt(13)])
    fit(resumed.model, WINDOWS, chosen, 0, tmp_path / "broken", [MaskKeeper(resumed)])
    for (name, expected), value in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(value, expected), name


def test_the_log_holds_the_learning_rate_of_each_step(tmp_path):
    fit(small_model("llama"), WINDOWS, schedule(warmup=0.4, lr=1e-2), 0, tmp_path)
    rates = [float(row.split(",")[2]) for row in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert rates[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01]) and 0 < rates[-1] < rates[-2]


def test_validation_stops_training_at_its_best(tmp_path):
    text = WINDOWS[:4]  # not the training text, so its perplexity falls and then rises
    model = small_model("llama")
    chosen = schedule(max_steps=60, batch_size=1, accumulate=1, lr=3e-2, warmup=0.0)
    windows = torch.randint(3, 61, (60, 16), generator=torch.Generator().manual_seed(2))
    held_out = HeldOut(text, 2, 3, tmp_path)
    fit(model, windows, chosen, 0, tmp_path, validation=Validation(held_out, 2))
    held_out.restore(model)
    rows = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    values = [float(row[-1]) for row in rows if row[-1]]
    assert len(rows) < 60 and len(rows) % 2 == 0
    assert len(values) == len(rows) // 2
    assert min(values) not in values[-3:]
    assert held_out.measure(model, torch.device("cpu")) == pytest.approx(min(values), rel=1e-5)


@pytest.mark.parametrize("patience", [2, 100])
def test_best_weights_are_restored_after_a_kill_at_the_last_step(tmp_path, patience):
    windows = torch.randint(3, 61, (60, 16), generator=torch.Generator().manual_seed(2))
    chosen = schedule(max_steps=60, batch_size=1, accumulate=1, lr=3e-2, warmup=0.0, checkpoint_every=1)
    found = []
    for _ in range(2):  # the second resumes from the checkpoint of the first one's last step
        model, held_out = small_model("llama"), HeldOut(WINDOWS[:4], 2, patience, tmp_path)
        fit(model, windows, chosen, 0, tmp_path, validation=Validation(held_out, 2))
        found.append((held_out.step, {name: value.clone() for name, value in model.state_dict().items()}))
        held_out.restore(model)
        found[-1] += ({name: value.clone() for name, value in model.state_dict().items()},)
    (step, last, best), (step_again, _, best_again) = found
    assert step == step_again and (step == 60) == (patience == 100)
    assert any(not torch.equal(last[name], best[name]) for name in best)
    assert all(torch.equal(best[name], best_again[name]) for name in best)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_kill_at_the_best_weights_leaves_those_of_the_last_checkpoint(tmp_path, monkeypatch, recorded):
    chosen = schedule(checkpoint_every=3, lr=3e-3)

    def run(name: str) -> nn.Module:
        model, held_out = small_model("llama"), HeldOut(WINDOWS[:4], 2, 30, tmp_path / name)
        fit(model, WINDOWS, chosen, 0, tmp_path / name, validation=Validation(held_out, 1))
        held_out.restore(model)
        assert len(list((tmp_path / name / "checkpoints").glob("best=*"))) <= 2
        return model

    def record(folder, path, original=checksums.record):
        if recorded:
            original(folder, path)
        if path.name == "best=5.safetensors":
            raise Killed
        if not recorded:
            original(folder, path)

    whole = run("whole")
    with monkeypatch.context() as patched:
        patched.setattr(checksums, "record", record)
        with pytest.raises(Killed):
            run("broken")
    resumed = run("broken")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_an_incomplete_checkpoint_is_replaced(tmp_path):
    whole = with_dropout()
    fit(whole, WINDOWS, schedule(), 0, tmp_path / "whole")
    (tmp_path / "broken/checkpoints").mkdir(parents=True)
    for batch in (9, 11, 17):  # a kill before the checksum of a checkpoint is recorded, and two after it
        with pytest.raises(Killed):
            fit(with_dropout(), WINDOWS, schedule(), 0, tmp_path / "broken", [KillAt(batch)])
        if batch == 9:
            (tmp_path / "broken/checkpoints/step=6.ckpt").write_bytes(b"half")
    resumed = with_dropout()
    fit(resumed, WINDOWS, schedule(), 0, tmp_path / "broken")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.slow
def test_resuming_with_another_number_of_processes_is_refused(tmp_path):
    fit(small_model("llama"), WINDOWS, schedule(max_steps=10), 0, tmp_path)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    torch.save(torch.load(path, weights_only=True) | {"processes": 4}, path)
    checksums.record(tmp_path, path)
    with pytest.raises(
        UserError, match=f"started with 4 processes .*: launch with --num_processes 4, or remove {tmp_path} to start"
    ):
        fit(small_model("llama"), WINDOWS, schedule(max_steps=10), 0, tmp_path)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    model = small_model("llama")
    with pytest.raises(UserError, match=r"step \d+ .*set a smaller lr than 1e\+20"):
        fit(model, WINDOWS, schedule(lr=1e20, warmup=0.0, clip=0.0, checkpoint_every=1), 0, tmp_path)
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["state_dict"].values())


@pytest.mark.slow
def test_tensorboard_shows_what_the_csv_holds(tmp_path):
    fit(small_model("llama"), WINDOWS, schedule(loggers=["tensorboard"]), 0, tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([float(row[1]) for row in rows])


def test_activation_checkpointing_trains_the_same(tmp_path):
    one, two = small_model("llama"), small_model("llama")
    fit(one, WINDOWS, schedule(), 0, tmp_path / "one")
    fit(two, WINDOWS, schedule(checkpoint_activations=True), 0, tmp_path / "two")
    for (name, expected), value in zip(one.state_dict().items(), two.state_dict().values()):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_effective_batch_does_not_depend_on_the_number_of_processes(world_size):
    for batch_size, accumulate in [(8, 1), (4, 2), (2, 4), (1, 8)]:
        size, times = batch_per_process(schedule(batch_size=batch_size, accumulate=accumulate), world_size)
        assert size * times * world_size == 8
        assert size <= batch_size


def test_uneven_batches_are_refused():
    with pytest.raises(UserError, match="do not divide among 3 processes"):
        batch_per_process(schedule(), 3)
    with pytest.raises(UserError, match="do not divide among"):
        batch_per_process(schedule(batch_size=1, accumulate=1), 2)
