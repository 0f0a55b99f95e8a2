"""Finds which matrices of a block are pruned and which parameters stay dense, by structure, not by model name.

Shapes: E = experts, O = out_features, I = in_features.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from pipeline.engine.blocks import Block, find_blocks, is_matrix, language_model
from pipeline.engine.coverage import OUTSIDE, Entry
from pipeline.models.pointwise import PointwiseConv
from pipeline.runtime.errors import UserError

ROUTER = "router"
# forwards that are plain products; a subclass with its own forward may compute anything
PRODUCTS = (nn.Linear.forward, Conv1D.forward, PointwiseConv.forward)
# Path components that mean "router" in a block with experts. `gate_proj`, the gate of a gated MLP, does not match.
ROUTER_NAMES = re.compile(r"(^|\.)(\w*router\w*|gate|wg|\w*expert_gate|\w*topk_gat\w*|classifier)(\.|$)", re.IGNORECASE)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_shared_experts", "num_routed_experts", "total_experts")


@dataclass(frozen=True)
class Matrix:
    """A prunable matrix: the weight of a Linear, Conv1D or 1x1 convolution, or one expert's slice of a fused parameter."""

    module: nn.Module
    attribute: str = "weight"
    expert: int | None = None
    transposed: bool = False  # stored (in, out)
    routed: bool = False  # belongs to an expert, so only some tokens reach it

    @property
    def parameter(self) -> Tensor:
        return getattr(self.module, self.attribute)

    @property
    def weight_OI(self) -> Tensor:
        """The weight as (out, in), a view of the module's current one."""
        stored = self.parameter.data
        stored = stored if self.expert is None else stored[self.expert]
        stored = stored.flatten(1) if stored.dim() == 4 else stored
        return stored.T if self.transposed else stored

    def stored(self, tensor_OI: Tensor) -> Tensor:
        """Turns an (out, in) tensor into the orientation of the stored weight."""
        if self.parameter.dim() == 4:
            return tensor_OI[..., None, None]
        return tensor_OI.T if self.transposed else tensor_OI


@dataclass(frozen=True)
class Dense:
    """A parameter of two or more dimensions that stays dense."""

    parameter: Tensor
    reason: str


def matrices(block: Block, blocks: list[Block]) -> dict[str, Matrix]:
    """The prunable matrices of a block by parameter name, such as `model.layers.0.mlp.experts.down_proj[3]` for expert 3.

    A module that several blocks share belongs to the first of them. Raises `UserError` as `classify` does.
    """
    return {name: entry for name, entry in classify(block, blocks).items() if isinstance(entry, Matrix)}


def matrices_of(model: nn.Module) -> dict[str, Matrix]:
    """The prunable matrices of a model by parameter name."""
    blocks = find_blocks(model)
    return {name: matrix for block in blocks for name, matrix in matrices(block, blocks).items()}


def classify(block: Block, blocks: list[Block]) -> dict[str, Matrix | Dense]:
    """All parameters of a block with two or more dimensions by name: a `Matrix` (one per expert) or `Dense`. Raises
    `UserError` if one 2-D parameter holds the matrices of several experts."""
    seen = {id(p) for other in blocks[: block.index] for p in other.module.parameters()}
    found: dict[str, Matrix | Dense] = {}
    experts = _experts(block.module)
    for path, module in block.module.named_modules():
        in_experts = dict(fused_parameters(module))
        for attribute, parameter in module.named_parameters(recurse=False):
            is_vector = parameter.dim() < 2 or (parameter.squeeze().dim() < 2 and not is_matrix(module))
            if id(parameter) in seen or is_vector or attribute.endswith("bias"):
                continue
            seen.add(id(parameter))  # two modules of a block may share it
            name = ".".join(part for part in (block.name, path, attribute) if part)
            if attribute in in_experts:
                transposed = _is_transposed(module, attribute, parameter)
                for expert in range(len(parameter)):
                    found[f"{name}[{expert}]"] = Matrix(module, attribute, expert, transposed, routed=True)
            elif _is_router(path, module, experts):
                found[name] = Dense(parameter, ROUTER)
            elif attribute == "weight" and computes_linear(module):
                routed = any(path.startswith(f"{place}.") for place in experts)
                found[name] = Matrix(module, transposed=isinstance(module, Conv1D), routed=routed)
            elif "expert" in type(module).__name__.lower() and parameter.dim() == 2:
                raise UserError(
                    f"{type(module).__name__} is not supported: {name} holds the matrices of all its experts in one"
                )
            else:
                found[name] = Dense(parameter, f"not a plain matrix product: {type(module).__name__}")
    return found


def coverage_entries(model: nn.Module, blocks: list[Block]) -> dict[str, Entry]:
    """All that could be pruned, by name: parameters in the blocks, and the language model's matrices outside them, except
    the head. Call it before a walk, which drops the weights."""
    found = {}
    for block in blocks:
        for name, part in classify(block, blocks).items():
            if isinstance(part, Matrix):
                found[name] = Entry(block.name, part.weight_OI.numel(), None)
            else:
                found[name] = Entry(block.name, part.parameter.numel(), part.reason)
    inside = {module for block in blocks for module in block.module.modules()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, module in language_model(model):
        if is_matrix(module) and module not in inside and module is not head:
            found[f"{path}.weight"] = Entry("", module.weight.numel(), OUTSIDE)
    return found


def fused_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The fused parameters of an experts module, by attribute: (E, O, I), or (E, I, O) if stored transposed."""
    counts = {getattr(module, name, None) for name in EXPERT_COUNTS}
    for name, parameter in module.named_parameters(recurse=False):
        known = hasattr(module, "is_transposed") or len(parameter) in counts
        if known and parameter.dim() == 3 and min(parameter.shape[1:]) > 1:
            yield name, parameter


def computes_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b. A class with its own forward is judged by its output shape (Falcon's Linear
    passes, DeepSeek V4's grouped one does not); `InputObserver` later compares its numbers."""
    if type(module).forward in PRODUCTS:
        return True
    if not isinstance(module, nn.Linear):
        return False
    on_meta = {name: torch.empty_like(parameter, device="meta") for name, parameter in module.named_parameters()}
    try:
        out = functional_call(
            module, on_meta, torch.empty(2, module.in_features, dtype=module.weight.dtype, device="meta")
        )
    except Exception:  # whatever a forward raises on these shapes
        return False
    return out.shape == (2, module.out_features)


def _is_transposed(module: nn.Module, attribute: str, parameter: Tensor) -> bool:
    """Whether fused matrices are stored (E, I, O). The experts interface of transformers says so. Otherwise we go by the
    hidden size, which is the input of an expert's first projection and the output of its last; if that is ambiguous, they
    are stored like a Linear. `InputObserver` checks the result against the actual products."""
    if hasattr(module, "is_transposed"):
        return module.is_transposed
    hidden, (rows, columns) = getattr(module, "hidden_size", None), parameter.shape[1:]
    return columns == hidden != rows if "down" in attribute else rows == hidden != columns


def _experts(block: nn.Module) -> dict[str, int]:
    """The paths of the modules that hold experts (fused, or a module list), and their number of experts."""
    found = {}
    for path, module in block.named_modules():
        if parameters := dict(fused_parameters(module)):
            found[path] = len(next(iter(parameters.values())))
        elif isinstance(module, nn.ModuleList) and path.rpartition(".")[2] == "experts":
            found[path] = len(module)
    return found


def _is_router(path: str, module: nn.Module, experts: dict[str, int]) -> bool:
    """Whether a module has "router" in its name. Next to experts also: whether it has the name of a gate, one output per
    expert, or a single output, like the gate of a shared expert."""
    if "router" in path.rpartition(".")[2]:  # Gemma 3n has one without experts
        return True
    for place, count in experts.items():
        parent = place.rpartition(".")[0]
        if path.startswith(f"{place}.") or not path.startswith(f"{parent}." if parent else ""):
            continue
        outputs = module.weight.shape[0] if parent and is_matrix(module) else None
        if ROUTER_NAMES.search(path) or outputs in (1, count):
            return True
    return False
