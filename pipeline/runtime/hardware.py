"""What machine a stage runs on, in the words of a report."""

import os
import platform
from pathlib import Path

import psutil
import torch

from pipeline.runtime.memory import GIB


def machine() -> str:
    """Such as `2 x NVIDIA H100 80GB HBM3 (79 GiB each); AMD EPYC 9654, 16 cores, 128 GiB`, of this node."""
    host = f"{_processor()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / GIB:.0f} GiB"
    if not torch.cuda.is_available():
        return host
    first, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    return f"{count} x {first.name} ({first.total_memory / GIB:.0f} GiB{' each' if count > 1 else ''}); {host}"


def system() -> str:
    return f"Python {platform.python_version()}, {platform.system()} {platform.release()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or an ARM, whose kernel gives numbers only
        return platform.processor() or platform.machine()
