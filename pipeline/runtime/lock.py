"""Owns the lock of a run folder: one run at a time works in it, with however many processes on however many machines.

`<run_dir>/.lock` names the process that holds it, which touches the file every `BEAT` seconds. A lock is stale when that
process is gone, or, where this cannot be seen because it ran elsewhere, when the file is not touched any more.

Not one of `filelock`'s (4.2), each of which lacks something here. FileLock is flock: mounts with local_lock (NFS) or localflock
(Lustre) keep it to one machine, so two would hold it, and it does not name its holder. SoftFileLease is nearest, but takes a
stale lock over by renameat2's exchange, which NFS and SMB refuse: there a killed run would block its folder for ever (tried:
with the exchange refused, it waits until it times out). StrictSoftFileLock never clears the lock of another machine.
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
SILENCE = 30.0  # seconds; measured by watching, for the clocks of two machines differ


@contextmanager
def held(run_dir: Path) -> Iterator[str]:
    """Holds the lock of a folder, which is made; yields what `is_seen` looks for. `UserError` where another run has it."""
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
        with _one_at_a_time(run_dir):
            while not _create(path, json.dumps(mine)):
                _clear_away(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    over = threading.Event()
    threading.Thread(target=_touch, args=(path, over), daemon=True).start()
    try:
        yield mine["token"]
    finally:
        over.set()
        if _holder(path).get("token") == mine["token"]:
            with suppress(OSError):
                path.unlink()


def is_seen(run_dir: Path, token: str) -> bool:
    """Whether the lock that process 0 made is seen from here."""
    until = time.monotonic() + PATIENCE
    while _holder(run_dir / ".lock").get("token") != token:
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def _create(path: Path, text: str) -> bool:
    try:
        number = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(number, text.encode())
    except OSError:  # a full disk
        path.unlink()
        raise
    finally:
        os.close(number)
    return True


def _clear_away(path: Path) -> None:
    """Removes a stale lock; `UserError` where it is not stale."""
    holder = _holder(path)
    if not _is_stale(path, holder):
        raise UserError(
            f"{path.parent} is in use by process {holder.get('process')} on {holder.get('host')} since "
            f"{holder.get('since')}: wait for it, end it, or set another run_dir=..."
        )
    if _holder(path) == holder:
        path.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(run_dir: Path) -> Iterator[None]:
    """Of many that find a stale lock, one shall take it, and none clear away the lock that another has just made. Some
    network file systems cannot do this: there the moment between a look and the removal stays open."""
    number = os.open(run_dir, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _is_stale(path: Path, holder: dict) -> bool:
    if holder.get("machine") == _machine():
        try:
            return abs(psutil.Process(holder["process"]).create_time() - holder["started"]) > 1
        except psutil.NoSuchProcess:
            return True
    print(f"{path.parent} was left locked on {holder.get('host')}: looking for a sign of life", flush=True)
    stamp, until = _stamp(path), time.monotonic() + SILENCE
    while time.monotonic() < until:
        time.sleep(1)
        if _stamp(path) != stamp:
            return False
    return True


def _holder(path: Path) -> dict:
    return files.read_json(path) or {}


def _stamp(path: Path) -> int:
    try:
        with open(path) as file:  # opening makes a network file system ask for the newest time
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _touch(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _machine() -> str:
    """This boot of this machine, and the container: where a process number means the same process."""
    found = [socket.gethostname()]
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        with suppress(OSError):
            found.append(os.readlink(path) if path.is_symlink() else path.read_text().strip())
    return " ".join(found)
