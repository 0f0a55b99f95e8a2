"""The masked LoRA of any parameter, however it is used: as fused experts, or read as `module.weight`.

Shapes: E = experts, O = out_features, I = in_features, R = rank; E is absent if the parameter is one matrix.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.recovery import sharding
from pipeline.recovery.effective import effective, mask_gradient_
from pipeline.sparsity.packed import pack


class Call:
    """The effective weights read in one call of a block: computed once however often they are read, and freed when the call
    ends. Autograd saves only a key for each; backward recomputes the weight."""

    def __init__(self) -> None:
        self.weights: dict[Any, Tensor] = {}
        self.recomputed: dict[Any, Tensor] = {}

    def pack(self, saved: Tensor) -> Any:
        for key, weight in self.weights.items():
            if (
                saved.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
                and saved.dtype == weight.dtype
            ):
                return key, (saved.size(), saved.stride(), saved.storage_offset())
        return saved

    @torch.no_grad()
    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        key, view = packed
        if key not in self.recomputed:
            self.recomputed[key] = _compute(key, key[0].a, key[0].b)
        return self.recomputed[key].as_strided(*view)


class Scope:
    """Gives each call of one of `blocks` (attention, experts, ...) its own `Call`.

    `recompute`: backward recomputes the weights. Off if activations are checkpointed: then the whole block runs again, and
    saved-tensor hooks inside the checkpoint would keep it from freeing tensors.
    """

    def __init__(self, blocks: Iterable[nn.Module], recompute: bool) -> None:
        self.recompute, self.used = recompute, False
        self.calls: list[tuple[Call, Any]] = []  # running calls, the innermost last
        for block in dict.fromkeys(blocks):
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._exit, always_call=True)

    def _enter(self, block: nn.Module, args: tuple) -> None:
        call, hooks = Call(), None
        if self.recompute and self.used and torch.is_grad_enabled():
            hooks = torch.autograd.graph.saved_tensors_hooks(call.pack, call.unpack)
            hooks.__enter__()
        self.calls.append((call, hooks))

    def _exit(self, block: nn.Module, args: tuple, out: Any) -> None:
        call, hooks = self.calls.pop()
        if hooks is not None:
            hooks.__exit__(None, None, None)
        call.weights.clear()


class _Effective(torch.autograd.Function):
    """M * (W + scale * B A) in the stored shape, with gradients for A and B only."""

    @staticmethod
    def forward(ctx, a, b, key, call):
        ctx.save_for_backward(a, b)
        ctx.key, ctx.call = key, call
        return _compute(key, a, b)

    @staticmethod
    def backward(ctx, grad):
        if ctx.call is not None:
            ctx.call.recomputed.pop(ctx.key, None)  # every user of the weight has run its backward
        return *ctx.key[0].gradients(grad, *ctx.saved_tensors), None, None


def read_effective(masked: nn.Module) -> Tensor:
    """The effective weight of a masked layer; under autocast in the dtype of its matmuls (grouped_mm ignores autocast and
    would compute in the weight's dtype)."""
    device, scope = masked.a.device.type, masked.scope
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    key = (masked, dtype, torch.is_grad_enabled())  # a weight read without gradients must not be reused with them
    if scope is None or not scope.calls:
        return _Effective.apply(masked.a, masked.b, key, None)
    scope.used, (call, _) = True, scope.calls[-1]
    if key not in call.weights:
        call.weights[key] = _Effective.apply(masked.a, masked.b, key, call)
    return call.weights[key]


def _compute(key: tuple, a: Tensor, b: Tensor) -> Tensor:
    masked, dtype, _ = key
    weight = masked.effective_weight(a, b)
    return weight if dtype is None else weight.to(dtype)


class MaskedParameter(nn.Module):
    """A parametrisation (torch.nn.utils.parametrize): `module.name` reads as M * (W + scale * B A), A (E, R, I), B (E, O, R).

    So any experts implementation sees the effective weights. One that indexes experts one at a time (`eager`) is correct but
    costs a full-size gradient per expert; transformers uses `grouped_mm` if the model allows it.
    Dropout has no effect here, since it acts on layer inputs.
    """

    def __init__(self, module: nn.Module, name: str, rank: int, scale: float, transposed: bool) -> None:
        """`transposed`: stored (E, I, O)."""
        super().__init__()
        weight = getattr(module, name)
        *experts, outs, ins = weight.shape if weight.dim() < 4 else weight.shape[:2]  # 4: of a 1x1 convolution
        if transposed:
            outs, ins = ins, outs
        self.scale, self.transposed, self.shape = scale, transposed, weight.shape
        self.scope: Scope | None = None
        self.nonzero_pruned: Tensor | int = 0  # nonzero pruned weights in the last forward
        self.dense: list[int] = []  # experts without a mask; they do not train
        options: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(*experts, rank, ins, **options))
        self.lora_B = nn.Parameter(torch.zeros(*experts, outs, rank, **options))
        nn.init.uniform_(self.lora_A, -(ins**-0.5), ins**-0.5)  # peft's kaiming_uniform_ with a = sqrt(5)
        self.register_buffer("mask_bits", None, persistent=False)
        self.attach(module, name)

    def attach(self, module: nn.Module, name: str) -> None:
        """Also parametrises `module`, which shares the parameter."""
        # unsafe: the safe way would compute the weights to check their shape
        parametrize.register_parametrization(module, name, self, unsafe=True)
        self.parametrization_lists = [module.parametrizations[name]]  # in a list, so that it is not a submodule

    def set_mask(self, mask: Tensor, dense: list[int]) -> None:
        self.mask_bits, self.dense = pack(mask.contiguous().to(self.a.device)), dense

    @property
    def a(self) -> Tensor:
        return self.lora_A

    @property
    def b(self) -> Tensor:
        return self.lora_B

    def effective_weight(self, a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
        """M * (W + scale * B A) in the shape and dtype of W (`base`, else the module's own); counts nonzero pruned weights."""
        base = self.parametrization_lists[0].original if base is None else base
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        matrix = base.flatten(1) if base.dim() == 4 else base
        weight, self.nonzero_pruned = effective(matrix, left, right, self.mask_bits, self.scale)
        return weight.view_as(base)

    def gradients(self, grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        grad = mask_gradient_(grad.to(a.dtype, copy=True, memory_format=torch.contiguous_format), self.mask_bits)
        if self.dense:
            grad[self.dense] = 0.0
        grad = grad.mT if self.transposed else grad.flatten(1) if grad.dim() == 4 else grad
        return self.scale * (b.mT @ grad), self.scale * (grad @ a.mT)

    @torch.no_grad()
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """See `MaskedLinear.merged_weight`."""
        base = sharding.full_tensor(self.parametrization_lists[0].original if weight is None else weight)
        a, b = sharding.full_tensor(self.a), sharding.full_tensor(self.b)
        return self.effective_weight(a, b, base.to(a.device))

    def forward(self, weight: Tensor) -> Tensor:
        return read_effective(self)
