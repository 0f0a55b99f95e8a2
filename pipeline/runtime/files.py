"""Owns the way files are written and recognised: whole or not at all, and by their content."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.runtime.errors import UserError

BLOCK = 1 << 20  # bytes
BLOCKS = 64  # read of a large file
READ_WHOLE = BLOCK * BLOCKS  # bytes up to which a file is not a large one

os.umask(UMASK := os.umask(0o077))  # it can be read only by setting it; once, before there are threads


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; flushed and renamed at the end, so that `path` is never half a file.

    What keeps it from being written, such as a full disk, is a `UserError`.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.part")  # two runs may measure the same
    try:
        tmp.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        tmp.chmod(0o666 & ~UMASK)  # safetensors writes 0600
        _flush(tmp)
        os.replace(tmp, path)
        with suppress(OSError):  # some file systems cannot
            _flush(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            tmp.unlink()
        raise UserError(f"cannot write {path}: {error} (the same command goes on here, once that is mended)") from error


def apply_umask(folder: Path) -> None:
    """Gives every file in a folder the mode that `open` would have given it: libraries that write safetensors leave 0600.

    Folders are as `mkdir` made them; a chmod would clear the set-group-ID bit of a shared one.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~UMASK)


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict | None:
    """None where there is no such file, or no whole one."""
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash of names, sizes and contents. Of a file over 64 MiB, 64 blocks spread over it are read: a 70B model takes
    seconds, and a model trained further differs in every block."""
    total = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            starts = (
                range(0, size, BLOCK)
                if size <= READ_WHOLE
                else [i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
            )
            for start in starts:
                file.seek(start)
                total.update(file.read(BLOCK))
    return total.hexdigest()[:16]


def sha256(path: Path) -> str:
    """Of the file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
