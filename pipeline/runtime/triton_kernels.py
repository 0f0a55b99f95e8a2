"""Loads modules of Triton kernels, which need Triton, its compilers and a driver, and so may fail in many ways."""

import os
from collections.abc import Callable
from types import ModuleType

import torch

from pipeline.runtime import processes
from pipeline.runtime.errors import one_line


class TritonKernels:
    """A module of kernels, loaded and checked once on each device. If any of it fails, a line says so once.

    `imported` imports the module and returns it. The import statement is the caller's, so that the module counts as its code
    (code.py). `check(module, device)` runs the kernels and raises if a result is wrong. The line says for which `purpose`
    there are no kernels, and what is done `instead`.
    """

    def __init__(
        self,
        imported: Callable[[], ModuleType],
        check: Callable[[ModuleType, torch.device], None],
        purpose: str,
        instead: str,
    ) -> None:
        self.imported, self.check, self.purpose, self.instead = imported, check, purpose, instead
        self.loaded: dict[torch.device, ModuleType | None] = {}

    def on_gpu(self, device: torch.device) -> ModuleType | None:
        """The module if `device` is a GPU, else None."""
        return self.load(device) if device.type == "cuda" else None

    def load(self, device: torch.device) -> ModuleType | None:
        """The module, checked on the device. None without Triton, or if the check fails."""
        if device not in self.loaded:
            self.loaded[device] = self._load(device)
        return self.loaded[device]

    def _load(self, device: torch.device) -> ModuleType | None:
        try:
            module = self.imported()
            if device.type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "0":
                raise RuntimeError("TRITON_INTERPRET is set")  # thousands of times slower
            self.check(module, device)
            return module
        except Exception as error:  # of the import, Triton's compiler, its C compiler, the driver
            reason = one_line(error)[:300] or type(error).__name__
            processes.say(f"no Triton kernels for {self.purpose}: {reason} ({self.instead})")
            return None
