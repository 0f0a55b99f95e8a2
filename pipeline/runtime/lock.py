"""The lock of a run folder: one run at a time uses it, with any number of processes on any number of machines.

`<run_dir>/.lock` names the process that holds it, which touches the file every `BEAT` seconds. The lock is stale when that
process has ended or, if it ran on another machine, when the file is no longer touched.

Why none of filelock 4.2's locks: FileLock uses flock, which some NFS and Lustre mounts keep local to one machine, so two
machines would hold it, and it does not name its holder. SoftFileLease takes over a stale lock by renameat2's exchange, which
NFS and SMB refuse: a killed run would block its folder for ever (tried). StrictSoftFileLock never clears the lock of another
machine.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil

from pipeline.runtime import files
from pipeline.runtime.errors import UserError

BEAT = 5.0  # seconds
PATIENCE = 60.0  # seconds that a network file system may take to show a new file
SILENCE = 30.0  # seconds without a touch; measured by watching, because the clocks of two machines differ


@contextmanager
def held(run_dir: Path) -> Iterator[str]:
    """Creates the folder and holds its lock; yields the token for `is_visible`. Raises `UserError` if another run holds it."""
    path = run_dir / ".lock"
    process = psutil.Process()
    mine = {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "process": process.pid,
        "started": process.create_time(),
        "since": datetime.now().isoformat(" ", "seconds"),
    }
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with _exclusive(run_dir):
            while not _create(path, json.dumps(mine)):
                _remove_stale(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    done = threading.Event()
    threading.Thread(target=_touch, args=(path, done), daemon=True).start()
    try:
        yield mine["token"]
    finally:
        done.set()
        if _holder(path).get("token") == mine["token"]:
            with suppress(OSError):
                path.unlink()


def is_visible(run_dir: Path, token: str) -> bool:
    """Whether this machine sees the lock that process 0 holds, within `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    while _holder(run_dir / ".lock").get("token") != token:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _create(path: Path, text: str) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, text.encode())
    except OSError:  # a full disk
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    return True


def _remove_stale(path: Path) -> None:
    """Removes a stale lock; raises `UserError` if it is not stale."""
    holder = _holder(path)
    if not _is_stale(path, holder):
        raise UserError(
            f"{path.parent} is in use by process {holder.get('process')} on {holder.get('host')} since "
            f"{holder.get('since')}: wait for it, end it, or set another run_dir=..."
        )
    if _holder(path) == holder:
        path.unlink(missing_ok=True)


@contextmanager
def _exclusive(run_dir: Path) -> Iterator[None]:
    """Keeps a run from removing the lock that another has just taken over from a stale one. Not possible on some network
    file systems, where that race remains."""
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_stale(path: Path, holder: dict) -> bool:
    if holder.get("machine") == _machine():
        try:
            return abs(psutil.Process(holder["process"]).create_time() - holder["started"]) > 1
        except psutil.NoSuchProcess:
            return True
    print(f"{path.parent} is locked by {holder.get('host')}: checking for {SILENCE:g} s if it is alive", flush=True)
    stamp, deadline = _stamp(path), time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        time.sleep(1)
        if _stamp(path) != stamp:
            return False
    return True


def _holder(path: Path) -> dict:
    return files.read_json(path) or {}


def _stamp(path: Path) -> int:
    try:
        with open(path) as file:  # opening makes a network file system refresh the time
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _touch(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _machine() -> str:
    """The machine, its boot and the container: within these a process id is unique."""
    parts = [socket.gethostname()]
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        with suppress(OSError):
            parts.append(os.readlink(path) if path.is_symlink() else path.read_text().strip())
    return " ".join(parts)
