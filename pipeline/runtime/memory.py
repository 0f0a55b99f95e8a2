"""Sizes of models, free memory and peak memory, in GiB."""

import gc
import resource
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import nn

GIB = 2**30


def text(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.1f} MiB"


def size_gib(module: nn.Module) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.parameters()) / GIB


def free_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    return psutil.virtual_memory().available / GIB


def free_memory() -> None:
    """Frees models that are only held by reference cycles, as in lm-eval's wrapper and in a Trainer."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Restarts the measurement of `peak_gib`; on a CPU only if the kernel supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float:
    """The peak since `reset_peak`: allocated on the GPU, or on a CPU resident, including the pages of mapped model files."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
