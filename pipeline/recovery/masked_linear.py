"""The masked LoRA layer of a Linear: W + M * (scale * B A), with the mask inside forward and merge.

Shapes: O = out_features, I = in_features, R = rank, N = tokens.
"""

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.recovery import sharding
from pipeline.recovery.effective import effective, mask_gradient_
from pipeline.recovery.masked_parameter import Scope, read_effective
from pipeline.recovery.quantization import dequantized
from pipeline.runtime.errors import UserError
from pipeline.sparsity.packed import pack

ADAPTER = "default"


class _EffectiveLinear(torch.autograd.Function):
    """x W_eff^T + bias; the gradients of A and B come from the masked gradient of W_eff.

    There is no LoRA branch per token, and only x is kept for backward, which saves memory at the price of one product
    (O, N) x (N, I) in backward.
    """

    @staticmethod
    def forward(ctx, input_NI, weight_OI, bias_O, a_RI, b_OR, layer):
        ctx.save_for_backward(input_NI, weight_OI, a_RI, b_OR)
        ctx.layer = layer
        return F.linear(input_NI, weight_OI.to(input_NI.dtype), bias_O)

    @staticmethod
    def backward(ctx, grad_NO):
        input_NI, weight_OI, a_RI, b_OR = ctx.saved_tensors
        grad_input = grad_NO @ weight_OI.to(grad_NO.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad_NO.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        grad_a, grad_b = ctx.layer.lora_gradients(_weight_gradient(grad_NO, input_NI), a_RI, b_OR)
        return grad_input, None, grad_bias, grad_a, grad_b, None


class _RecomputedLinear(torch.autograd.Function):
    """The same, but W_eff is computed in forward and again in backward, so it takes no memory in between.

    `dropped_NI` is the input of the LoRA branch after dropout; None without dropout.
    """

    @staticmethod
    def forward(ctx, input_NI, dropped_NI, bias_O, a_RI, b_OR, layer):
        ctx.layer = layer
        ctx.save_for_backward(input_NI, dropped_NI, a_RI, b_OR)
        if dropped_NI is None:
            return F.linear(input_NI, layer.effective_counted(a_RI, b_OR).to(input_NI.dtype), bias_O)
        delta_OI = layer.delta(a_RI, b_OR).to(input_NI.dtype)
        return F.linear(input_NI, layer.base_OI().to(input_NI.dtype), bias_O) + F.linear(dropped_NI, delta_OI)

    @staticmethod
    def backward(ctx, grad_NO):
        input_NI, dropped_NI, a_RI, b_OR = ctx.saved_tensors
        layer, grad_input, grad_dropped = ctx.layer, None, None
        if ctx.needs_input_grad[0]:
            weight_OI = layer.effective(a_RI, b_OR)[0] if dropped_NI is None else layer.base_OI()
            grad_input = grad_NO @ weight_OI.to(grad_NO.dtype)
        if ctx.needs_input_grad[1]:
            grad_dropped = grad_NO @ layer.delta(a_RI, b_OR).to(grad_NO.dtype)
        grad_bias = grad_NO.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        lora_input_NI = input_NI if dropped_NI is None else dropped_NI
        grad_a, grad_b = layer.lora_gradients(_weight_gradient(grad_NO, lora_input_NI), a_RI, b_OR)
        return grad_input, grad_dropped, grad_bias, grad_a, grad_b, None


def _weight_gradient(grad_NO: Tensor, input_NI: Tensor) -> Tensor:
    return grad_NO.flatten(0, -2).T @ input_NI.flatten(0, -2)


class MaskedLinear(LoraLinear):
    """peft's LoRA layer for Linear (also quantised by bitsandbytes) and Conv1D, with a mask.

    Cached: keeps the effective weights, which `refresh` must update after each change of A or B. Fast, but takes the weights'
    memory again. Recomputed: computes them on use. For quantised or sharded weights, dropout, little memory, and CPUs.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs) -> None:
        if config.use_dora:
            raise UserError("DoRA cannot keep a mask, since its magnitudes act on whole rows: leave out use_dora")
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)  # weights stored (in, out)
        self.scope: Scope | None = None
        self.nonzero_pruned: Tensor | int = 0  # nonzero pruned weights in the last forward
        for name in ("effective_OI", "mask_bits"):
            self.register_buffer(name, None, persistent=False)

    def set_mask(self, mask: Tensor, cached: bool = True) -> None:
        """Sets the mask, given in the shape of the stored weight."""
        device = self.get_base_layer().weight.device
        mask_OI = self._oriented(mask).contiguous().to(device)
        self.cached, self.shape, self.mask_bits = cached, mask_OI.shape, pack(mask_OI)
        if cached:
            self.effective_OI = torch.empty(self.shape, dtype=self.get_base_layer().weight.dtype, device=device)
            self.refresh()

    @property
    def scale(self) -> float:
        return self.scaling[ADAPTER]

    @property
    def a(self) -> Tensor:
        return self.lora_A[ADAPTER].weight

    @property
    def b(self) -> Tensor:
        return self.lora_B[ADAPTER].weight

    @property
    def weight(self) -> Tensor:
        """The effective weights, for models that read a Linear's weight without calling it (Mamba's dt_proj, fused kernels)."""
        return read_effective(self)

    def effective_weight(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """The effective weights in the shape of the stored weight."""
        return self._oriented(self.effective_counted(a_RI, b_OR))

    def gradients(self, grad: Tensor, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of A and B, given that of the stored weight."""
        return self.lora_gradients(self._oriented(grad).clone(memory_format=torch.contiguous_format), a_RI, b_OR)

    def lora_gradients(self, grad_OI: Tensor, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of A and B, given that of the effective weight, which is masked in place."""
        grad_OI = mask_gradient_(grad_OI, self.mask_bits).to(a_RI.dtype)
        return self.scale * (b_OR.T @ grad_OI), self.scale * (grad_OI @ a_RI.T)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The shape of the stored weight, also when it is packed."""
        return (self.in_features, self.out_features)[:: 1 if self.fan_in_fan_out else -1]

    def _oriented(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.fan_in_fan_out else tensor

    def base_OI(self) -> Tensor:
        """The frozen weights, unquantised."""
        return self._oriented(dequantized(self.get_base_layer().weight))

    def delta(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """M * (scale * B A), (O, I)."""
        return effective(None, b_OR, a_RI, self.mask_bits, self.scale)[0]

    def effective(self, a_RI: Tensor, b_OR: Tensor, base_OI: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """M * (W + scale * B A), (O, I), in the dtype of W (`base_OI`, else the layer's own weight), and how many of its pruned
        weights are nonzero."""
        return effective(self.base_OI() if base_OI is None else base_OI, b_OR, a_RI, self.mask_bits, self.scale)

    def effective_counted(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """The effective weights for forward; records how many pruned ones are nonzero."""
        effective_OI, self.nonzero_pruned = self.effective(a_RI, b_OR)
        return effective_OI

    @torch.no_grad()
    def refresh(self) -> None:
        """Updates the cached effective weights after a change of A or B."""
        self.effective_OI.copy_(self.effective_counted(self.a, self.b))

    @torch.no_grad()
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """The effective weights in the shape of the stored weight: bit for bit those of forward (up to the rounding of mixed
        precision). `weight` is the unquantised weight to merge into, if the layer holds a quantised one. All ranks of a
        sharded model must call it."""
        a_RI, b_OR = sharding.full_tensor(self.a), sharding.full_tensor(self.b)
        base_OI = None if weight is None else self._oriented(weight).to(a_RI.device)
        return self._oriented(self.effective(a_RI, b_OR, base_OI)[0])

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        a, b = self.a, self.b
        bias = self.get_base_layer().bias
        if bias is not None:
            bias = bias.to(x.dtype)
        if self.cached:
            return _EffectiveLinear.apply(x, self.effective_OI, bias, a, b, self)
        dropout = self.lora_dropout[ADAPTER]
        # dropout acts on the LoRA branch's input only, so the branches cannot share one product
        dropped = dropout(x) if self.training and isinstance(dropout, nn.Dropout) else None
        return _RecomputedLinear.apply(x, dropped, bias, a, b, self)
