"""The setting `deterministic`: reproducible gradients on GPUs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.runtime.errors import UserError


def prepare(wanted: bool) -> None:
    """Must be called before CUDA is used: cuBLAS reads this variable once, and else may sum in a different order each time."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def training(wanted: bool) -> Iterator[None]:
    """Makes torch use deterministic algorithms inside the block. Raises `UserError` if the model uses an operation that has
    none."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(wanted or before)
        # only finds bugs, and costs a write for each new tensor
        torch.utils.deterministic.fill_uninitialized_memory = fill and not wanted
        yield
    except RuntimeError as error:
        if wanted and "does not have a deterministic implementation" in str(error):
            raise UserError(f"set deterministic=false: {str(error).partition(',')[0]}") from error
        raise
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
