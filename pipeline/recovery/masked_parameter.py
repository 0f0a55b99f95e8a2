"""Owns the masked LoRA of a parameter that is used in any way: as fused experts, or read as `module.weight`.

Shapes: E = experts, O = out_features, I = in_features, R = rank; the E is absent where the parameter is one matrix.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.recovery import sharding
from pipeline.sparsity.masks import apply_, multiply_, nonzero_pruned, pack, unpack


class Call:
    """The effective weights that one call of a block reads. Each is made once, however often it is read, and let go
    of when the call ends. What autograd saves of one is only a note of which it was: backward makes the weight again."""

    def __init__(self) -> None:
        self.made: dict[Any, Tensor] = {}
        self.again: dict[Any, Tensor] = {}

    def pack(self, saved: Tensor) -> Any:
        for key, made in self.made.items():
            if saved.untyped_storage().data_ptr() == made.untyped_storage().data_ptr() and saved.dtype == made.dtype:
                return key, (saved.size(), saved.stride(), saved.storage_offset())
        return saved

    @torch.no_grad()
    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        key, view = packed
        if key not in self.again:
            self.again[key] = _made(key, key[0].a, key[0].b)
        return self.again[key].as_strided(*view)


class Scope:
    """Blocks of a model (attention, experts, ...), one call of which has one `Call`.

    `recomputed`: backward makes the weights again. Not where activations are checkpointed: the whole block is then run again,
    and hooks on saved tensors inside of the checkpoint would keep from it what it should drop.
    """

    def __init__(self, blocks: Iterable[nn.Module], recomputed: bool) -> None:
        self.recomputed, self.used = recomputed, False
        self.calls: list[tuple[Call, Any]] = []  # that are running, the innermost last
        for block in dict.fromkeys(blocks):
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave, always_call=True)

    def _enter(self, block: nn.Module, args: tuple) -> None:
        call, hooks = Call(), None
        if self.recomputed and self.used and torch.is_grad_enabled():
            hooks = torch.autograd.graph.saved_tensors_hooks(call.pack, call.unpack)
            hooks.__enter__()
        self.calls.append((call, hooks))

    def _leave(self, block: nn.Module, args: tuple, out: Any) -> None:
        call, hooks = self.calls.pop()
        if hooks is not None:
            hooks.__exit__(None, None, None)
        call.made.clear()


class _Effective(torch.autograd.Function):
    """M * (W + scale * B A) as the parameter is stored, with gradients of A and B alone."""

    @staticmethod
    def forward(ctx, a, b, key, call):
        ctx.save_for_backward(a, b)
        ctx.key, ctx.call = key, call
        return _made(key, a, b)

    @staticmethod
    def backward(ctx, grad):
        if ctx.call is not None:
            ctx.call.again.pop(ctx.key, None)  # all that used the weight has had its turn
        return *ctx.key[0].gradients(grad, *ctx.saved_tensors), None, None


def read(masked: nn.Module) -> Tensor:
    """The effective weight of a masked layer, for whoever reads it; in mixed precision in the dtype of its matmul (grouped_mm
    is not under autocast, and would compute in that of the weight)."""
    device, scope = masked.a.device.type, masked.scope
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    key = (masked, dtype, torch.is_grad_enabled())  # what was read without gradients must not be used with them
    if scope is None or not scope.calls:
        return _Effective.apply(masked.a, masked.b, key, None)
    scope.used, (call, _) = True, scope.calls[-1]
    if key not in call.made:
        call.made[key] = _Effective.apply(masked.a, masked.b, key, call)
    return call.made[key]


def _made(key: tuple, a: Tensor, b: Tensor) -> Tensor:
    masked, dtype, _ = key
    made = masked.effective_weight(a, b)
    return made if dtype is None else made.to(dtype)


class MaskedParameter(nn.Module):
    """A parametrisation (torch.nn.utils.parametrize): `module.name` reads as M * (W + scale * B A), A (E, R, I), B (E, O, R).

    So any implementation of experts sees the effective weights. One that indexes them expert by expert (`eager`) is correct,
    but costs a gradient of full size for each expert; transformers takes `grouped_mm` wherever a model allows it.
    Dropout, which acts on inputs of a layer, does not act here.
    """

    def __init__(self, module: nn.Module, name: str, rank: int, scale: float, transposed: bool) -> None:
        """`transposed`: stored (E, I, O)."""
        super().__init__()
        weight = getattr(module, name)
        *experts, outs, ins = weight.shape
        if transposed:
            outs, ins = ins, outs
        self.scale, self.transposed, self.shape = scale, transposed, weight.shape
        self.scope: Scope | None = None
        self.nonzero_pruned: Tensor | int = 0  # pruned weights that were not zero when forward last used them
        self.dense: list[int] = []  # experts without a mask, which do not train
        place: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(*experts, rank, ins, **place))
        self.lora_B = nn.Parameter(torch.zeros(*experts, outs, rank, **place))
        nn.init.uniform_(self.lora_A, -(ins**-0.5), ins**-0.5)  # as peft's, which is kaiming_uniform_ with a = sqrt(5)
        self.register_buffer("mask_bits", None, persistent=False)
        self.attach(module, name)

    def attach(self, module: nn.Module, name: str) -> None:
        """To `module` too, which holds the same parameter."""
        parametrize.register_parametrization(
            module, name, self, unsafe=True
        )  # safe would make the weights to see their shape
        self.home = [module.parametrizations[name]]  # in a list: no child of this module

    def set_mask(self, mask: Tensor, dense: list[int]) -> None:
        self.mask_bits, self.dense = pack(mask.contiguous().to(self.a.device)), dense

    @property
    def a(self) -> Tensor:
        return self.lora_A

    @property
    def b(self) -> Tensor:
        return self.lora_B

    def mask(self) -> Tensor:
        return unpack(self.mask_bits, self.shape)

    def effective_weight(self, a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
        """M * (W + scale * B A) in the shape and dtype of W (`base`, else the module's own), its nonzero_pruned counted."""
        base, mask = self.home[0].original if base is None else base, self.mask()
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        add = torch.addmm if base.dim() == 2 else torch.baddbmm
        with torch.autocast(base.device.type, enabled=False):
            made = apply_(add(base.to(b.dtype), left, right, alpha=self.scale).to(base.dtype), mask)
        self.nonzero_pruned = nonzero_pruned(made, mask).count_nonzero()
        return made

    def gradients(self, grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        grad = multiply_(grad.to(a.dtype, copy=True, memory_format=torch.contiguous_format), self.mask())
        if self.dense:
            grad[self.dense] = 0.0
        grad = grad.mT if self.transposed else grad
        return self.scale * (b.mT @ grad), self.scale * (grad @ a.mT)

    @torch.no_grad()
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """See `MaskedLinear.merged_weight`."""
        base = sharding.whole(self.home[0].original if weight is None else weight)
        a, b = sharding.whole(self.a), sharding.whole(self.b)
        return self.effective_weight(a, b, base.to(a.device))

    def forward(self, weight: Tensor) -> Tensor:
        return read(self)
