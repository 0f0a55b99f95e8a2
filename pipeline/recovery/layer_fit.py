"""Trains one decoder layer towards given outputs while its masks hold. Pure math; functions stand in for the processes.

Shapes: B = sequences of a batch, T = tokens, D = hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.runtime.errors import UserError
from pipeline.sparsity.masks import apply_, violation_of


def token_error(out_BTD: Tensor, target_BTD: Tensor, features: int = -1) -> Tensor:
    """Sum over tokens of ||out - target||^2 / ||target||^2, in fp32; `features`: the dimension D.

    Relative per token, since the next layer normalises each token. Otherwise the few tokens with hidden states hundreds of
    times larger (Sun et al. 2024, "Massive Activations in Large Language Models") would dominate. Near-zero tokens, such as
    padding, count as a tenth of the median size, or of the mean size where most tokens are zero (pixels after a ReLU).
    """
    target_BTD = target_BTD.float()
    size_BT = target_BTD.square().sum(features)
    usual = torch.where(size_BT.median() > 0, size_BT.median(), size_BT.mean())
    size_BT = size_BT.clamp_min(0.1**2 * usual).clamp_min(torch.finfo(torch.float32).tiny)
    return ((out_BTD.float() - target_BTD).square().sum(features) / size_BT).sum()


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
    """Trains a layer's `parameters` in place with Adam and a cosine schedule; returns the first and the best `judge()`.

    `masks`: by name, of the pruned parameters. Each of `steps` lists the batches of an optimizer step; every epoch shuffles
    the steps. `error(i)` is this rank's error on batch i; `judge()` is the held-out error over all ranks. `lr` is relative
    to the size of each parameter. The best epoch's weights are kept (or the original ones), so no layer gets worse. Raises
    `UserError` if the error exceeds that of an all-zero output, which is 1, and the first one by a tenth.
    """
    if not parameters:  # all belong to earlier blocks
        return (found := judge()), found
    # fp32 copies, since bf16 cannot represent small steps; fp32 parameters are their own masters
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
                    masters[name].grad.masked_fill_(~masks[name], 0)  # multiplying would keep a NaN
            optimizer.step()
            schedule.step()
            for name, parameter in parameters.items():
                parameter.copy_(masters[name])
                if name in masks:
                    apply_(parameter, masks[name])
                    violation = violation_of(name, parameter, masks[name])
                    assert violation is None, violation
        now = judge()
        if not now <= max(1.0, 1.1 * before):
            raise UserError(f"its error grew from {before:.3g} to {now:.3g} in epoch {epoch + 1}")
        if now < best:
            best, kept = now, _copy(parameters)
    for name, parameter in parameters.items():
        parameter.copy_(kept[name])
    return before, best


def _gradients(parameters: dict[str, Tensor], batches: range, error: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """Summed over the batches in float64, so that neither their order nor the number of ranks matters."""
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    for batch in batches:
        with torch.enable_grad():
            found = torch.autograd.grad(error(batch), list(parameters.values()), allow_unused=True)
        for total, part in zip(sums.values(), found):
            if part is not None:  # None: an expert without tokens in this batch
                total += part
    return sums


def _size(parameter: Tensor) -> float:
    """Root mean square, at least 1e-3 for biases that start at zero, as in Adafactor (Shazeer & Stern 2018, section 8). A
    relative step suits models whose weights differ tenfold in size; one absolute step would not."""
    return max(1e-3, parameter.square().mean().sqrt().item())


def _copy(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in parameters.items()}
