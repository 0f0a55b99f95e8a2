"""Owns the setting `deterministic`: gradients on GPUs that come out the same each time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.runtime.errors import UserError


def prepare(wanted: bool) -> None:
    """Before CUDA is first used: else cuBLAS may sum in another order each time."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def training(wanted: bool) -> Iterator[None]:
    """Inside, the same numbers give the same gradients. Raises `UserError` where a model uses an operation that cannot."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(wanted or before)
        torch.utils.deterministic.fill_uninitialized_memory = (
            fill and not wanted
        )  # a check for bugs, a write for each tensor
        yield
    except RuntimeError as error:
        if wanted and "does not have a deterministic implementation" in str(error):
            raise UserError(f"set deterministic=false: {str(error).partition(',')[0]}") from error
        raise
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
