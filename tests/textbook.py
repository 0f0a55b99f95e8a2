"""Pruning as in the papers, slow and plain: the reference for the engine in tests and benchmarks.

Sample by sample, with two full passes per layer, a running mean over samples in fp32, a loop over column groups and full
stable sorts. Follows the published algorithms (Sun et al. 2023; Frantar & Alistarh 2023; Zhang et al. 2024).
"""

import contextlib
import math

import torch
from torch import Tensor, nn

from pipeline.sparsity.patterns import NofM, Pattern


def wanda(weight: Tensor, norm: Tensor) -> Tensor:
    return weight.abs().float() * norm


def magnitude(weight: Tensor, norm: Tensor) -> Tensor:
    return weight.abs().float()


def ria(weight: Tensor, norm: Tensor) -> Tensor:
    size = weight.abs().float()
    return (size / size.sum(0) + size / size.sum(1).reshape(-1, 1)) * norm**0.5


SCORES = {"wanda": wanda, "wanda_variant": wanda, "magnitude": magnitude, "ria": ria}
ABLATIONS = ("magnitude_seq", "magnitude_iter", "wanda_seq", "wanda_iter")


class FirstLayerReached(Exception):
    pass


@torch.no_grad()
def prune(model: nn.Module, windows: Tensor, method: str, pattern: Pattern) -> None:
    """Prunes a Llama in place; `windows` are (samples, T)."""
    hidden, more = [], {}

    def catch(module, args, kwargs) -> None:
        hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        more.update(kwargs)
        raise FirstLayerReached

    layers = model.model.layers
    hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with contextlib.suppress(FirstLayerReached):
            model(window[None].to(model.device), use_cache=False)
    hook.remove()
    for layer in layers:
        modules = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        found = {name: Statistics(module, method) for name, module in modules.items()}
        hooks = [module.register_forward_hook(found[name].hook()) for name, module in modules.items()]
        for h in hidden:
            layer(h, **more)
        for hook in hooks:
            hook.remove()
        for name, module in modules.items():
            if method in SCORES:
                module.weight.data[to_prune(method, module.weight.data, found[name].norm(), pattern)] = 0
            else:
                surgeon(module, found[name], method, pattern)
        hidden = [layer(h, **more) for h in hidden]


class Statistics:
    """The mean over samples of each feature's squared norm, and 2/n X X^T for the OBS methods."""

    def __init__(self, module: nn.Linear, method: str) -> None:
        self.samples = 0
        self.square = torch.zeros(module.in_features, device=module.weight.device)
        self.hessian = (
            None
            if method in SCORES
            else torch.zeros(module.in_features, module.in_features, device=module.weight.device)
        )

    def hook(self):
        def add(module, args, out) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).t().float()
            self.square *= self.samples / (self.samples + 1)
            if self.hessian is not None:
                self.hessian *= self.samples / (self.samples + 1)
            self.samples += 1
            self.square += torch.norm(x, p=2, dim=1) ** 2 / self.samples
            if self.hessian is not None:
                scaled = math.sqrt(2 / self.samples) * x
                self.hessian += scaled.matmul(scaled.t())

        return add

    def norm(self) -> Tensor:
        return self.square.reshape(1, -1).sqrt()


def lowest_of_groups(score: Tensor, pattern: NofM) -> Tensor:
    gone = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, score.shape[1], pattern.m):
        group = score[:, start : start + pattern.m]
        gone.scatter_(1, start + torch.topk(group, pattern.m - pattern.n, dim=1, largest=False)[1], True)
    return gone


def to_prune(method: str, weight: Tensor, norm: Tensor, pattern: Pattern) -> Tensor:
    score = SCORES[method](weight, norm)
    if isinstance(pattern, NofM):
        return lowest_of_groups(score, pattern)
    if method in ("magnitude", "ria"):
        return score <= torch.sort(score.flatten())[0][int(score.numel() * pattern.ratio)]
    if method == "wanda_variant":
        return variant(score, pattern.ratio)
    order = torch.sort(score, dim=-1, stable=True)[1]
    gone = torch.zeros_like(score, dtype=torch.bool)
    return gone.scatter_(1, order[:, : int(score.shape[1] * pattern.ratio)], True)


def variant(score: Tensor, ratio: float) -> Tensor:
    ordered = torch.sort(score, dim=-1, stable=True)[0]
    running, total = torch.cumsum(ordered, dim=1), score.sum(dim=1)

    def given(alpha: float) -> tuple[Tensor, float]:
        within = running <= (total * alpha).reshape(-1, 1)
        threshold = torch.gather(ordered, 1, within.sum(1, keepdim=True) - 1)
        gone = score <= threshold
        return gone, gone.sum().item() / gone.numel()

    alpha, low, high = 0.4, 0.0, 0.8
    gone, sparsity = given(alpha)
    while abs(sparsity - ratio) > 0.001 and high - low >= 0.001:
        if sparsity > ratio:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        gone, sparsity = given(alpha)
    return gone


def surgeon(module: nn.Linear, found: Statistics, method: str, pattern: Pattern, block: int = 128) -> None:
    weight, hessian = module.weight.data.float().clone(), found.hessian
    norm = hessian.diagonal().sqrt()  # up to a factor that all features share, the norm of the inputs
    whole = None
    if method.endswith("_seq"):
        whole = to_prune(method.removesuffix("_seq"), weight, norm, pattern)
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    index = torch.arange(len(hessian))
    hessian[index, index] += 0.01 * torch.mean(torch.diag(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)

    def score(part: Tensor, start: int) -> Tensor:
        columns = slice(start, start + part.shape[1])
        if method == "sparsegpt":
            return part**2 / torch.diag(upper)[columns].reshape(1, -1) ** 2
        return part.abs() * norm[columns] if method == "wanda_iter" else part.abs()

    for first in range(0, weight.shape[1], block):
        last = min(first + block, weight.shape[1])
        part, errors = weight[:, first:last].clone(), torch.zeros_like(weight[:, first:last])
        small = upper[first:last, first:last]
        gone = torch.zeros_like(part, dtype=torch.bool)
        if whole is not None:
            gone = whole[:, first:last]
        elif not isinstance(pattern, NofM):
            found_score = score(part, first)
            gone = found_score <= torch.sort(found_score.flatten())[0][int(found_score.numel() * pattern.ratio)]
        for i in range(last - first):
            if whole is None and isinstance(pattern, NofM) and i % pattern.m == 0:
                group = score(part[:, i : i + pattern.m], first + i)
                gone.scatter_(1, i + torch.topk(group, pattern.m - pattern.n, dim=1, largest=False)[1], True)
            column = part[:, i].clone()
            kept = column.clone()
            kept[gone[:, i]] = 0
            error = (column - kept) / small[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(small[i, i:].unsqueeze(0))
            part[:, i] = kept
            errors[:, i] = error
        weight[:, first:last] = part
        weight[:, last:] -= errors.matmul(upper[first:last, last:])
    module.weight.data = weight.to(module.weight.dtype)
