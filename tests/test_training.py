"""A killed training resumed is the uninterrupted one, to the bit; a step is the same on any number of processes."""

import pytest
import torch
from lightning import Callback
from torch import nn

from callbacks.mask_keeper import MaskKeeper
from pipeline.errors import UserError
from pipeline.training import Schedule, fit
from tests.test_decoder import small_model

WINDOWS = torch.randint(3, 61, (10 * 4, 16), generator=torch.Generator().manual_seed(1))


def schedule(**more) -> Schedule:
    usual = dict(
        max_steps=10, batch_size=2, accumulate=2, lr=1e-2, warmup=0.2, weight_decay=0.01, clip=1.0, checkpoint_every=2
    )
    return Schedule(**usual | more)


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
        layer.self_attn.attention_dropout = 0.2  # random numbers in forward must be the same after a resume
    return model


@pytest.mark.parametrize("batch", [3, 8, 13, 18])
def test_killed_and_resumed_is_uninterrupted(tmp_path, batch):
    whole, broken = with_dropout(), with_dropout()
    fit(whole, WINDOWS, schedule(), tmp_path / "whole")
    with pytest.raises(Killed):
        fit(broken, WINDOWS, schedule(), tmp_path / "broken", [KillAt(batch)])
    resumed = with_dropout()
    fit(resumed, WINDOWS, schedule(), tmp_path / "broken")
    for (name, expected), value in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(value, expected), name
    one, two = (
        [row.rsplit(",", 1)[0] for row in (tmp_path / which / "metrics.csv").read_text().splitlines()]
        for which in ("whole", "broken")
    )
    assert one == two
    assert len(one) == 1 + 10


def test_checkpoints_hold_only_what_trains(tmp_path):
    model = small_model("llama")
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, WINDOWS, schedule(), tmp_path)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert list(state) == ["model.model.layers.0.mlp.up_proj.weight"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.layers.0.mlp.up_proj.weight"}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_masks_are_reapplied_once_per_real_step(tmp_path, accumulate):
    calls = []
    keeper = MaskKeeper(lambda: calls.append(1))
    windows = WINDOWS[: 5 * 2 * accumulate]
    fit(small_model("llama"), windows, schedule(max_steps=5, accumulate=accumulate), tmp_path, [keeper])
    assert keeper.steps == 5
    assert len(calls) == 5 + 1  # and once at the start


def test_a_step_the_scaler_skips_is_not_counted():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    calls = []
    keeper = MaskKeeper(lambda: calls.append(1))
    trainer = type("", (), {"optimizers": [optimizer]})()
    keeper.on_train_start(trainer, None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(7):
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4)).sum() * (torch.inf if step in (1, 4) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert keeper.steps == 5
    keeper.teardown(trainer, None, "fit")
    optimizer.step()
    assert keeper.steps == 5


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_effective_batch_does_not_depend_on_the_processes(world_size):
    for batch_size, accumulate in [(8, 1), (4, 2), (2, 4), (1, 8)]:
        size, times = schedule(batch_size=batch_size, accumulate=accumulate).share(world_size)
        assert size * times * world_size == 8
        assert size <= batch_size


def test_what_cannot_be_shared_evenly_is_refused():
    with pytest.raises(UserError, match="cannot be shared evenly by 3 processes"):
        schedule().share(3)
    with pytest.raises(UserError, match="cannot be shared"):
        schedule(batch_size=1, accumulate=1).share(2)
