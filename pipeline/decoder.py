"""Owns a Hugging Face decoder's insides: its layers, how each is called, and which of its matrices are pruned.

Nothing is known by model name. The layers are the one module list as long as the configuration says; how a layer is
called is recorded from the model's own forward and replayed whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError


@dataclass
class Call:
    """The arguments of one decoder layer but for the hidden states."""

    args: tuple
    kwargs: dict[str, Any]
    named: bool  # the hidden states came as `hidden_states=`


@dataclass
class Decoder:
    """A causal LM whose decoder layers can be called one at a time."""

    model: nn.Module
    prefix: str = field(init=False)  # such as "model.layers"
    layers: nn.ModuleList = field(init=False)
    calls: dict[tuple[int, torch.Size], Call] = field(default_factory=dict)  # by layer and shape of the batch
    tuple_out: bool | None = None  # whether a layer returns a tuple, as in some families: its first call tells

    def __post_init__(self) -> None:
        self.prefix, self.layers = find_layers(self.model)
        for module in self.layers.modules():
            if is_experts(module):
                module.config._experts_implementation = "espalier"

    def place(self, device: torch.device) -> None:
        """Moves what is not a decoder layer (embeddings, positions), and layer 0, which `embed` calls once."""
        in_layers = {id(module) for layer in self.layers[1:] for module in layer.modules()}
        for module in self.model.modules():
            if id(module) not in in_layers:
                for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                    tensor.data = tensor.data.to(device)

    @torch.no_grad()
    def embed(self, batch_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D) at the entry of layer 0; records how the model calls each layer for this shape.

        The model's own forward runs with each layer replaced by a recorder that hands its input on, so masks, positions
        and whatever differs by layer (sliding and full attention) are the model's, not ours.
        """
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        entry: list[Tensor] = []

        def recorder(index: int, layer: nn.Module) -> Callable:
            forward = layer.forward  # bound before it is shadowed

            def record(*args, **kwargs):
                named = not args
                hidden = kwargs.pop("hidden_states") if named else args[0]
                kwargs = kwargs | {name: False for name in ("use_cache",) if name in kwargs}
                self.calls.setdefault((index, batch_BT.shape), Call(args[1:], kwargs, named))
                if index == 0:
                    entry.append(hidden)
                    if self.tuple_out is None:
                        self.tuple_out = isinstance(forward(hidden, *args[1:], **kwargs), tuple)
                return (hidden,) if self.tuple_out else hidden

            return record

        with self._layers_replaced(recorder):
            base(input_ids=batch_BT, use_cache=False)
        return entry[0]

    def run(self, index: int, layer: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """`layer` called as the model calls its layer `index`; (B, T, D) -> (B, T, D)."""
        call = self.calls[index, hidden_BTD.shape[:2]]
        if call.named:
            out = layer(*call.args, hidden_states=hidden_BTD, **call.kwargs)
        else:
            out = layer(hidden_BTD, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def head(self, batch_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) of the hidden states that left the last layer, for a batch that `embed` has seen.

        The model's own forward runs with each layer handing these on, so the final norm, the head and whatever is done to
        the logits are the model's. The layers themselves may have been released.
        """

        def handing_on(index: int, layer: nn.Module) -> Callable:
            return lambda *args, **kwargs: (hidden_BTD,) if self.tuple_out else hidden_BTD

        with self._layers_replaced(handing_on):
            return self.model(input_ids=batch_BT, use_cache=False).logits

    @contextmanager
    def _layers_replaced(self, forward_of: Callable[[int, nn.Module], Callable]) -> Iterator[None]:
        for index, layer in enumerate(self.layers):
            layer.forward = forward_of(index, layer)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def parameter_name(self, index: int, matrix: str) -> str:
        return f"{self.prefix}.{index}.{matrix}"


def release(layer: nn.Module) -> None:
    """Lets go of a layer's memory, once it is not called again."""
    for tensor in [*layer.parameters(), *layer.buffers()]:
        tensor.data = torch.empty(0, dtype=tensor.dtype)


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and module list of the decoder layers."""
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and matrices(module[0])
    ]
    outermost = [(n, m) for n, m in found if not any(n.startswith(other + ".") for other, _ in found)]
    if len(outermost) != 1:
        raise UserError(
            f"{type(model).__name__} is not understood: looked for one list of {count} decoder layers with Linear or Conv1D "
            f"matrices, found {', '.join(n for n, _ in outermost) or 'none'}"
        )
    return outermost[0]


@dataclass(frozen=True)
class Matrix:
    """A prunable matrix: the weight of a Linear or Conv1D, or one expert's slice of a fused parameter."""

    module: nn.Module
    attribute: str = "weight"
    expert: int | None = None
    transposed: bool = False  # stored (in, out)

    @property
    def weight_OI(self) -> Tensor:
        """The weight as (out, in), a view of what the module holds now."""
        stored = getattr(self.module, self.attribute).data
        stored = stored if self.expert is None else stored[self.expert]
        return stored.T if self.transposed else stored

    def stored(self, tensor_OI: Tensor) -> Tensor:
        """A tensor like the weight, oriented as it is stored."""
        return tensor_OI.T if self.transposed else tensor_OI


def matrices(layer: nn.Module) -> dict[str, Matrix]:
    """The prunable matrices of a decoder layer, by their parameter's name in it; `experts.down_proj[3]` is expert 3's.

    Routers stay dense: a Linear beside fused experts that is called gate or router, or that has one output.
    """
    found: dict[str, Matrix] = {}
    routed = any(is_experts(module) for module in layer.modules())
    for name, module in layer.named_modules():
        if is_experts(module):
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    for expert in range(len(parameter)):
                        matrix = Matrix(module, attribute, expert, module.is_transposed)
                        found[f"{name}.{attribute}[{expert}]"] = matrix
        elif isinstance(module, nn.Linear | Conv1D):
            is_router = name.rpartition(".")[2] in ("gate", "router") or module.weight.shape[0] == 1
            if not (routed and is_router):
                found[f"{name}.weight"] = Matrix(module, transposed=isinstance(module, Conv1D))
        elif not isinstance(module, nn.Conv1d) and any(p.dim() == 3 for p in module.parameters(recurse=False)):
            raise UserError(
                f"{type(module).__name__} ({name}) holds fused matrices that are not understood: looked for the experts "
                "interface of transformers (num_experts, is_transposed, has_gate)"
            )
    return found


def is_experts(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("num_experts", "is_transposed", "has_gate", "down_proj"))


def watched_experts(
    experts: nn.Module, hidden_ND: Tensor, chosen_NK: Tensor, weight_NK: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """The forward of fused experts, one after the other, so that `experts.watch(attribute, expert, input)` can see the
    input of each matrix. Fused experts call no Linear that a hook could be put on."""
    out_ND = torch.zeros_like(hidden_ND)
    watch = getattr(experts, "watch", None)

    def project(attribute: str, expert: int, tensor: Tensor) -> Tensor:
        if watch:
            watch(attribute, expert, tensor)
        weight = getattr(experts, attribute)[expert]
        bias = getattr(experts, f"{attribute}_bias")[expert] if experts.has_bias else None
        return nn.functional.linear(tensor, weight.T if experts.is_transposed else weight, bias)

    for expert in range(experts.num_experts):
        token, place = (chosen_NK == expert).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        inner = project("gate_up_proj" if experts.has_gate else "up_proj", expert, hidden_ND[token])
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        inner = project("down_proj", expert, inner)
        if experts.has_post_expert_norm:
            inner = experts.post_expert_norm(inner)
        out_ND.index_add_(0, token, (inner * weight_NK[token, place, None]).to(out_ND.dtype))
    return out_ND


ALL_EXPERTS_FUNCTIONS.register("espalier", watched_experts)
