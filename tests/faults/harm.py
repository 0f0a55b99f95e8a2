"""Ways to damage a folder; each returns a function that does it."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

Harm = Callable[[Path], object]


def cut(name: str, share: float = 0.5) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return harm


def put(name: str, content: str | bytes) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return harm


def remove(name: str) -> Harm:
    return lambda folder: (folder / name).unlink()


def disk(options: str) -> Harm:
    """Mounts a small tmpfs with these options at `disk`, until `undo`; an OSError if that is not permitted."""

    def harm(folder: Path) -> None:
        (folder / "disk").mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder / "disk"]
        if subprocess.run(mount, capture_output=True).returncode:
            raise PermissionError("mounting is not permitted here")

    return harm


def undo(folder: Path) -> None:
    if (folder / "disk").is_mount():
        subprocess.run(["umount", "-l", folder / "disk"], check=True)


def change_weights(change: Callable[[dict], object], name: str = "model.safetensors") -> Harm:
    def harm(folder: Path) -> None:
        path = folder / name
        weights = {name: weight.clone() for name, weight in load_file(path).items()}
        change(weights)
        save_file(weights, path, {"format": "pt"})

    return harm


def flip(path: Path, where: float | bytes = 0.5) -> None:
    """Changes one byte, at a share of the file or at a word in it, and keeps size and time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[content.index(where) if isinstance(where, bytes) else int(len(content) * where)] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
