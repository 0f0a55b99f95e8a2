"""Loads modules of Triton kernels, which need Triton, its compilers and a driver, and so may fail in many ways."""

import os
from collections.abc import Callable
from types import ModuleType

import torch

from pipeline.runtime import processes
from pipeline.runtime.errors import one_line


def load(
    imported: Callable[[], ModuleType],
    device: torch.device,
    check: Callable[[ModuleType, torch.device], None],
    purpose: str,
    instead: str,
) -> ModuleType | None:
    """The module that `imported` imports and returns, after `check(module, device)`, which runs its kernels and raises if a
    result is wrong. None if any of it fails; a line then says for which `purpose` and what is done `instead`. Callers cache the
    result, and name the module in an import statement, so that it counts as their code (code.py)."""
    try:
        module = imported()
        if device.type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "0":
            raise RuntimeError("TRITON_INTERPRET is set")  # thousands of times slower
        check(module, device)
        return module
    except Exception as error:  # of the import, Triton's compiler, its C compiler, the driver
        reason = one_line(error)[:300] or type(error).__name__
        processes.say(f"no Triton kernels for {purpose}: {reason} ({instead})")
        return None
