"""Copies of a model that is in memory, which users may have changed."""

import copy
from types import FunctionType

from torch import Tensor, nn

from pipeline.runtime.errors import UserError, one_line


def copy_of(model: nn.Module, shared: dict[int, Tensor] | None = None) -> nn.Module:
    """A deep copy, except of the tensors in `shared`, by their ids.

    Raises `UserError` if the model holds something that cannot be copied, or if the forward of a module is replaced by a
    closure, such as of torch.compile: in the copy it would still run the module that it was made of."""
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, FunctionType) and forward.__closure__:
            raise UserError(
                f"{f'{name}.' if name else ''}forward was replaced by a function that belongs to this module alone, so the "
                "model cannot be copied: remove it by `del module.forward` (torch.compile: use `module.compile()`)"
            )
    try:
        return copy.deepcopy(model, shared)
    except TypeError as error:  # hooks of loggers hold locks and files
        raise UserError(
            f"the model cannot be copied ({one_line(error)}): remove the hook or attribute that holds it"
        ) from error
