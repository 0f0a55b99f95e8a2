"""Builds and loads the compiled CPU kernels (kernels.cpp and its headers) for the instructions that this CPU has.

torch's extension loader builds them once, at first use, into a folder that only the user may write. If that fails, one line
says why, and callers use dense products.
"""

import functools
import os
import shutil
import stat
import sys
import sysconfig
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
    "-mavx512vnni",
    "-mpopcnt",
    "-mbmi2",
    "-mfma",
    "-mf16c",
)
# best first: the flags in /proc/cpuinfo that it needs, and the compiler's flags
NEEDS = {"avx512_vbmi2", "avx512_vnni", "avx512bw", "avx512vl", "avx512dq"}
INSTRUCTIONS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "avx512bf16": (NEEDS | {"avx512_bf16"}, (*AVX512, "-mavx512bf16")),
    "avx512": (NEEDS, AVX512),
    "avx2": ({"avx2", "fma", "f16c", "bmi2", "popcnt"}, ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt")),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of inputs that the kernels support
FLAGS = ("-O3", "-std=c++20", "-fopenmp")
_loaded: list[Any] = []  # what `load` returns, once it is known


@functools.cache
def cpu_flags() -> set[str]:
    """The CPU's flags on Linux; empty elsewhere."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), ()))


def best() -> str | None:
    """The best of `INSTRUCTIONS` that this CPU has, or None."""
    return next((name for name, (needs, _) in INSTRUCTIONS.items() if needs <= cpu_flags()), None)


def load() -> Any | None:
    """The operators of kernels.cpp for the best instructions, built if needed. None if they cannot be built,
    which is reported once."""
    if not _loaded:  # functools.cache would do, but torch.compile traces through it
        _loaded.append(_load())
    return _loaded[0]


def _load() -> Any | None:
    if sys.byteorder != "little" or best() is None:
        processes.say(
            "no fast products of compact matrices: this CPU has neither AVX-512 VBMI2 nor AVX2 (using dense products)"
        )
        return None
    try:
        return build(best())
    except Exception as error:  # from the compiler, ninja, the disk
        processes.say(f"no fast products of compact matrices: {one_line(error)[:300]} (using dense products)")
        return None


def build(instructions: str, *more: str) -> Any:
    """The operators for one of `INSTRUCTIONS`, with `more` compiler flags. Raises if they cannot be built."""
    flags = [*FLAGS, *INSTRUCTIONS[instructions][1], *more]
    about = [
        [path.read_text() for path in sorted(SOURCE.parent.glob("kernels*.[ch]*"))],
        flags,
        torch.__version__,
        sys.platform,
        os.environ.get("CXX", ""),
    ]
    name = f"espalier_{instructions}_{files.digest(about)}"
    library = private(cache() / name) / f"{name}.so"
    if not library.is_file():
        _compile(name, flags, library)
    torch.ops.load_library(library)
    return getattr(torch.ops, name)


def compiler() -> str:
    """The C++ compiler that torch uses."""
    return os.environ.get("CXX", "g++")


def _compile(name: str, flags: list[str], library: Path) -> None:
    path = os.environ.get("PATH", os.defpath)
    # pip puts ninja there, also if the virtual environment is not active
    os.environ["PATH"] = os.pathsep.join((path, sysconfig.get_path("scripts")))
    try:
        _compile_with_tools(name, flags, library)
    finally:
        os.environ["PATH"] = path


def _compile_with_tools(name: str, flags: list[str], library: Path) -> None:
    for tool, what in ((compiler(), "a C++ compiler"), ("ninja", "ninja (pip install ninja)")):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is not installed: install {what}")
    processes.say("building the kernels for compact matrices, once (half a minute)")
    from torch.utils.cpp_extension import load as build_and_load

    # in its own folder: torch waits forever for the lock of a build that was killed
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        build_and_load(name, [str(SOURCE)], flags, build_directory=folder, is_python_module=False)
        os.replace(Path(folder) / library.name, library)


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "espalier"


def private(folder: Path) -> Path:
    """Creates the folder with mode 0700 and returns it. Raises if it or its parent belongs to another user or is writable by
    others: whoever can write it can run code as this user."""
    for place in (folder.parent, folder):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise RuntimeError(f"{place} may be written by others: remove it, or set XDG_CACHE_HOME")
    return folder
