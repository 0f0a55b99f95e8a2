"""The worker processes (worker.py) as their owner sees them."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pipeline.runtime.code import ROOT
from pipeline.runtime.errors import UserError, one_line
from pipeline.speed import worker

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class CannotMeasure(Exception):
    """What the model's own code raised."""


class Process:
    """The process of the model in `folder`; it answers one question at a time. `said` is what all of them printed."""

    def __init__(self, folder: Path, connection: socket.socket, said: IO[bytes]) -> None:
        self.folder, self.lines, self.said = folder, connection.makefile("rw"), said

    def ask(self, name: str, *arguments: Any) -> Any:
        """What that function of `Worker` returns; `CannotMeasure` where it raised, `UserError` where the process died."""
        line = ""
        with suppress(ConnectionError):
            self.lines.write(json.dumps([name, *arguments]) + "\n")
            self.lines.flush()
            line = self.lines.readline()
        if not line:
            self.said.seek(0)
            last = one_line(self.said.read().decode(errors="replace").strip().rpartition("\n")[2])[:300]
            raise UserError(
                f"the process that measured {self.folder} ended: is the memory too small for all models together?"
                + (f" ({last})" if last else "")
            )
        answer = json.loads(line)
        if "failed" in answer:
            raise CannotMeasure(answer["failed"])
        return answer["is"]


@contextmanager
def started(folders: dict[str, Path]) -> Iterator[dict[str, Process]]:
    """A process for each folder, by name; all end with the block, or with this process."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment["CUDA_VISIBLE_DEVICES"] = ""  # what is measured is the CPU
    with ExitStack() as stack:
        said = stack.enter_context(tempfile.TemporaryFile())
        pairs = [tuple(map(stack.enter_context, socket.socketpair())) for _ in folders]
        numbers = [theirs.fileno() for _, theirs in pairs]
        parent = subprocess.Popen(
            [sys.executable, "-m", worker.__name__, *map(str, numbers)],
            env=environment,
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,  # a group to end at once; Ctrl-C is for this process
        )
        stack.callback(_end, parent)
        for _, theirs in pairs:
            theirs.close()  # so that the end of a worker is seen
        yield {name: Process(folder, mine, said) for (name, folder), (mine, _) in zip(folders.items(), pairs)}


def _end(parent: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
