"""Trains one decoder layer to give wanted outputs while its masks hold. Pure math: processes enter as `all_sum`.

Shapes: B = sequences of a batch, T = tokens, D = hidden size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.masks import apply_, stray


def token_error(out_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Sum over tokens of ||out - target||^2 / ||target||^2, in fp32.

    Relative for each token, since what follows normalises each token: else the few tokens whose states are hundreds of
    times larger than the others' (Sun et al. 2024, "Massive Activations") would be all that is fitted.
    """
    target_BTD = target_BTD.float()
    size_BT = target_BTD.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((out_BTD.float() - target_BTD).square().sum(-1) / size_BT).sum()


def fit(
    layer: nn.Module,
    masks: dict[str, Tensor],
    error: Callable[[int], Tensor],
    steps: list[range],
    held_out: range,
    tokens: int,
    epochs: int,
    lr: float,
    seed: int,
    all_sum: Callable[[Tensor], Tensor],
) -> tuple[float, float]:
    """Trains all parameters of `layer` in place, Adam with a cosine; returns the held-out error before and after.

    `error(i)` is the summed `token_error` of this rank's batch i. An optimizer step takes the batches of one of `steps`,
    each epoch has them in an order of its own; `held_out` are the batches that judge, `tokens` their tokens on all ranks.
    The weights of the epoch with the lowest held-out error stay, those from before the first included, so that a layer
    never ends worse than it began. `masks` has the pruned parameters' masks by name. Errors are root mean squares over
    tokens. `UserError` where the error leaves what a layer of zeros would have.
    """
    parameters = dict(layer.named_parameters())
    # a step is finer than bf16 can tell; of fp32 parameters these are the parameters themselves
    masters = {name: parameter.detach().float() for name, parameter in parameters.items()}
    optimizer = torch.optim.Adam(masters.values(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(steps))

    def gradient(step: range) -> list[Tensor]:
        """float64 across batches and ranks: then neither their order nor the number of ranks matters."""
        sums = [torch.zeros_like(master, dtype=torch.float64) for master in masters.values()]
        for batch in step:
            with torch.enable_grad():
                found = torch.autograd.grad(error(batch), list(parameters.values()), allow_unused=True)
            for total, part in zip(sums, found):
                if part is not None:  # an expert that no token of the batch reached
                    total += part
        return [all_sum(total) for total in sums]

    def update() -> None:
        optimizer.step()
        schedule.step()
        for name, parameter in parameters.items():
            parameter.copy_(masters[name])
            if name in masks:
                apply_(masters[name], masks[name])
                apply_(parameter, masks[name])
                violation = stray(name, parameter, masks[name])
                assert violation is None, violation

    def judge() -> float:
        total = sum((error(batch).double() for batch in held_out), torch.zeros((), dtype=torch.float64))
        return math.sqrt(all_sum(total).item() / tokens)

    def snapshot() -> dict[str, Tensor]:
        return {name: parameter.clone() for name, parameter in parameters.items()}

    for parameter in parameters.values():
        parameter.requires_grad_(True)
    order = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        before = best = judge()
        kept = snapshot()
        for epoch in range(epochs):
            for index in torch.randperm(len(steps), generator=order).tolist():
                for (name, master), total in zip(masters.items(), gradient(steps[index])):
                    master.grad = (total.mul_(masks[name]) if name in masks else total).float()
                update()
            now = judge()
            if not now <= max(1.0, before):
                raise UserError(f"the error grew from {before:.3g} to {now:.3g} in epoch {epoch + 1}")
            if now < best:
                best, kept = now, snapshot()
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])
    return before, best
