"""Atomic writes of files, JSON and CSV, and fingerprints of files."""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.runtime.errors import UserError

BLOCK = 1 << 20  # bytes
BLOCKS = 64  # number of blocks that are read of a larger file
READ_WHOLE = BLOCK * BLOCKS  # bytes up to which a file is read whole

os.umask(UMASK := os.umask(0o077))  # can only be read by setting it: done once, before any thread starts


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is flushed and renamed to `path` at the end, so that `path` is never half written.

    Raises `UserError` if it cannot be written, for instance because the disk is full.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.part")  # two runs may write the same file
    try:
        tmp.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        tmp.chmod(0o666 & ~UMASK)  # safetensors writes 0600
        _flush(tmp)
        os.replace(tmp, path)
        with suppress(OSError):  # some file systems cannot flush folders
            _flush(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            tmp.unlink()
        raise UserError(f"cannot write {path}: {error} (once this is fixed, the same command resumes here)") from error


def refuse_existing(target: Path) -> None:
    if os.path.lexists(target):  # also a link to nothing
        raise UserError(f"{target} exists already: choose another target, or remove it")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which is renamed to `target` at the end, so that `target` appears only when it is complete. If
    the block fails, nothing is left. Raises `UserError` if `target` exists."""
    refuse_existing(target)
    work = target.with_name(f".{target.name}.part")
    shutil.rmtree(work, ignore_errors=True)  # of a killed process
    try:
        yield work
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def cache(run_dir: Path, name: str) -> Path:
    """The folder next to a run folder in which all runs there share a cache; inside the run folder if that cannot be written,
    as with run_dir=/out in a container."""
    shared = run_dir.parent / name
    try:
        shared.mkdir(parents=True, exist_ok=True)
    except OSError:
        return run_dir / name
    return shared if os.access(shared, os.W_OK | os.X_OK) else run_dir / name


def apply_umask(folder: Path) -> None:
    """Sets the mode of every file in a folder by the user's umask: safetensors writes 0600.

    Folders are left alone: a chmod would clear the set-group-ID bit of a shared one.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~UMASK)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict | None:
    """None if the file is missing or is not a JSON object."""
    try:
        value = json.loads(path.read_text())
        return value if isinstance(value, dict) else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def write_csv(path: Path, rows: list[dict]) -> None:
    """Writes a table with the columns of its first row, layer and matrix first. Writes nothing if there are no rows."""
    if not rows:
        return
    columns = sorted(rows[0], key=("layer", "matrix").__contains__, reverse=True)
    with atomic_write(path) as tmp, open(tmp, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def digest(value: Any) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash of names, sizes and contents. Of a file over 64 MiB, only 64 blocks spread evenly over it are read, so that a 70B
    model takes seconds; further training changes every block."""
    total = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        starts = range(0, size, BLOCK)
        if size > READ_WHOLE:
            starts = [i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
        with open(path, "rb") as file:
            for start in starts:
                file.seek(start)
                total.update(file.read(BLOCK))
    return total.hexdigest()[:16]


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
