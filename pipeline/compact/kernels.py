"""Owns the compiled kernels of the CPU runtime (kernels.cpp): which instructions they use, when they are built, where they lie.

They are built once, at first use, by torch's own loader of extensions into a folder of the user's that nobody else may
write. Where that cannot be, one line says why, and whoever asked takes the dense way.
"""

import functools
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.runtime import files, processes
from pipeline.runtime.errors import one_line

SOURCE = Path(__file__).with_name("kernels.cpp")
AVX512 = (
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512vbmi2",
    "-mpopcnt",
    "-mbmi2",
    "-mfma",
    "-mf16c",
)
# the best first: the flags of /proc/cpuinfo that it needs, and those of the compiler
INSTRUCTIONS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "avx512bf16": ({"avx512_vbmi2", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}, (*AVX512, "-mavx512bf16")),
    "avx512": ({"avx512_vbmi2", "avx512bw", "avx512vl", "avx512dq"}, AVX512),
    "avx2": ({"avx2", "fma", "f16c", "bmi2", "popcnt"}, ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt")),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the values that the kernels know
FLAGS = ("-O3", "-std=c++20", "-fopenmp")


@functools.cache
def cpu_flags() -> set[str]:
    """What Linux says of the CPU; empty elsewhere."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), ()))


def best() -> str | None:
    """The best of `INSTRUCTIONS` that this CPU has; None: it has none of them."""
    return next((name for name, (needs, _) in INSTRUCTIONS.items() if needs <= cpu_flags()), None)


@functools.cache
def load() -> Any | None:
    """The operators `product`, `expand` and `dense`, of the best instructions; built if they are not yet. None where they
    cannot be: a line on the terminal says why, once."""
    if sys.byteorder != "little" or best() is None:
        processes.say(
            "no fast products of compact matrices: this CPU has neither AVX-512 VBMI2 nor AVX2 (dense instead)"
        )
        return None
    try:
        return build(best())
    except Exception as error:  # of the compiler, ninja, the disk
        processes.say(f"no fast products of compact matrices: {one_line(error)[:300]} (dense instead)")
        return None


def build(instructions: str, *more: str) -> Any:
    """The operators of one of `INSTRUCTIONS`, with `more` flags of the compiler. Raises where they cannot be built."""
    flags = [*FLAGS, *INSTRUCTIONS[instructions][1], *more]
    about = [SOURCE.read_text(), flags, torch.__version__, sys.platform, os.environ.get("CXX", "")]
    name = f"espalier_{instructions}_{files.digest(about)}"
    library = private(cache() / name) / f"{name}.so"
    if not library.is_file():
        _compile(name, flags, library)
    torch.ops.load_library(library)
    return getattr(torch.ops, name)


def _compile(name: str, flags: list[str], library: Path) -> None:
    for tool, what in ((os.environ.get("CXX", "g++"), "a C++ compiler"), ("ninja", "ninja (pip install ninja)")):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is absent: install {what}")
    processes.say("building the products of compact matrices, once (half a minute)")
    from torch.utils.cpp_extension import load as build_and_load

    # in a folder of its own, since torch waits for ever for the lock of a build that was killed
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        build_and_load(name, [str(SOURCE)], flags, build_directory=folder, is_python_module=False)
        os.replace(Path(folder) / library.name, library)


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "espalier"


def private(folder: Path) -> Path:
    """The folder, made if need be, of mode 0700. Raises where it, or the one above, is another user's, or others may write
    there: who can write it can run code as this user."""
    for place in (folder.parent, folder):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise RuntimeError(f"{place} may be written by others: remove it, or set XDG_CACHE_HOME")
    return folder
