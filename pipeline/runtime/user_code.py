"""Checks of the code that a user's file may hold: what it returned, and that it left the tensors that it got."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.errors import UserError


def check_returned(
    who: str, got: Any, shape: torch.Size | None = None, dtype: torch.dtype | None = None, name: str = ""
) -> None:
    """Raises `UserError` unless `who` returned a tensor of the shape and type, if they are given. `name`: of the matrix."""
    if isinstance(got, Tensor) and shape in (None, got.shape) and dtype in (None, got.dtype):
        return
    found = f"{got.dtype} of {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
    wanted = f"{dtype or 'a tensor'}{f' of {tuple(shape)}' if shape is not None else ''}"
    raise UserError(f"{who} returned {found}{f' for {name}' if name else ''}: return {wanted}")


@contextmanager
def unchanged(who: str, **tensors: Tensor) -> Iterator[None]:
    """Raises `UserError` if `who`, which runs inside, changes one of the tensors in place: others read them later."""
    before = {name: tensor._version for name, tensor in tensors.items()}
    yield
    for name, tensor in tensors.items():
        if tensor._version != before[name]:
            raise UserError(f"{who} changes {name} in place, which is read again later: change {name}.clone()")
