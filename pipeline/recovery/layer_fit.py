"""Trains one decoder layer to give wanted outputs while its masks hold. Pure math: the processes enter as functions.

Shapes: B = sequences of a batch, T = tokens, D = hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.runtime.errors import UserError
from pipeline.sparsity.masks import apply_, violation_of


def token_error(out_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Sum over tokens of ||out - target||^2 / ||target||^2, in fp32.

    Relative for each token, since the next layer normalises each token: else the few tokens whose states are hundreds of
    times larger than the others' (Sun et al. 2024, "Massive Activations in Large Language Models") would be all that is
    fitted. A token of next to nothing, such as padding, counts as a tenth of the usual.
    """
    target_BTD = target_BTD.float()
    size_BT = target_BTD.square().sum(-1)
    size_BT = size_BT.clamp_min(0.1**2 * size_BT.median()).clamp_min(torch.finfo(torch.float32).tiny)
    return ((out_BTD.float() - target_BTD).square().sum(-1) / size_BT).sum()


@torch.no_grad()
def fit(
    parameters: dict[str, nn.Parameter],
    masks: dict[str, Tensor],
    steps: list[range],
    error: Callable[[int], Tensor],
    judge: Callable[[], float],
    all_sum: Callable[[Tensor], Tensor],
    epochs: int,
    lr: float,
    seed: int,
) -> tuple[float, float]:
    """Trains `parameters`, those of a layer, in place, with Adam and a cosine; returns what `judge` found first and last.

    `masks` has the masks of the pruned parameters by name. Each of `steps` names the batches of an optimizer step, and an
    epoch takes the steps in an order of its own; `error(i)` is this rank's error of batch i, `judge()` the error of all
    ranks on what does not train. `lr` is relative to the size of each parameter. The weights of the epoch that judges best
    stay, the pruned ones among them, so that no layer ends worse than it began. `UserError` where the error exceeds that of
    an output of zeros, which is 1.
    """
    if not parameters:  # all are those of blocks before it
        return (found := judge()), found
    # fp32, since a step is finer than bf16 can tell; of fp32 parameters these are the parameters themselves
    masters = {name: parameter.detach().float() for name, parameter in parameters.items()}
    optimizer = torch.optim.Adam([{"params": [master], "lr": lr * _size(master)} for master in masters.values()])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(steps))
    order = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    before = best = judge()
    kept = _copy(parameters)
    for epoch in range(epochs):
        for index in torch.randperm(len(steps), generator=order).tolist():
            for name, total in _gradients(parameters, steps[index], error).items():
                masters[name].grad = all_sum(total).float()
                if name in masks:
                    masters[name].grad.masked_fill_(~masks[name], 0)  # a product would let a NaN through
            optimizer.step()
            schedule.step()
            for name, parameter in parameters.items():
                parameter.copy_(masters[name])
                if name in masks:
                    apply_(parameter, masks[name])
                    violation = violation_of(name, parameter, masks[name])
                    assert violation is None, violation
        now = judge()
        if not now <= max(1.0, before):
            raise UserError(f"its error grew from {before:.3g} to {now:.3g} in epoch {epoch + 1}")
        if now < best:
            best, kept = now, _copy(parameters)
    for name, parameter in parameters.items():
        parameter.copy_(kept[name])
    return before, best


def _gradients(parameters: dict[str, Tensor], batches: range, error: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """Summed over the batches in float64, so that neither their order nor the number of ranks changes a step."""
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    for batch in batches:
        with torch.enable_grad():
            found = torch.autograd.grad(error(batch), list(parameters.values()), allow_unused=True)
        for total, part in zip(sums.values(), found):
            if part is not None:  # None: an expert that no token of the batch reached
                total += part
    return sums


def _size(parameter: Tensor) -> float:
    """Root mean square, at least 1e-3 for biases that begin at zero, as in Adafactor (Shazeer & Stern 2018, section 8): a
    step relative to it suits models whose weights differ tenfold in size, where one step for all would not."""
    return max(1e-3, parameter.square().mean().sqrt().item())


def _copy(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in parameters.items()}
