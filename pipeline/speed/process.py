"""Starts the worker processes (worker.py) and talks to them."""

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

LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class MeasurementError(Exception):
    """The model's code raised an error in the worker process."""


class Process:
    """The worker process of the model in `folder`. `output`: the file to which all workers print."""

    def __init__(self, folder: Path, connection: socket.socket, output: IO[bytes]) -> None:
        self.folder, self.lines, self.output = folder, connection.makefile("rw"), output

    def ask(self, name: str, *arguments: Any) -> Any:
        """Calls the method `name` of `Worker` and returns its result. Raises `MeasurementError` if the method raises, and
        `UserError` if the process has died."""
        line = ""
        with suppress(ConnectionError):
            self.lines.write(json.dumps([name, *arguments]) + "\n")
            self.lines.flush()
            line = self.lines.readline()
        if not line:
            self.output.seek(0)
            last = one_line(self.output.read().decode(errors="replace").strip().rpartition("\n")[2])[:300]
            raise UserError(
                f"the process that measured {self.folder} ended: is there enough memory for all models at once?"
                + (f" ({last})" if last else "")
            )
        answer = json.loads(line)
        if "error" in answer:
            raise MeasurementError(answer["error"])
        return answer["result"]


@contextmanager
def start_processes(folders: dict[str, Path], device: str = "cpu") -> Iterator[dict[str, Process]]:
    """Starts a process for each folder, by name. All end with the block, or with this process."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryFile())
        pairs = [tuple(map(stack.enter_context, socket.socketpair())) for _ in folders]
        descriptors = [remote.fileno() for _, remote in pairs]
        # CUDA may not be used after a fork from a process whose libraries have looked for GPUs
        for group in [descriptors] if device == "cpu" else [[descriptor] for descriptor in descriptors]:
            parent = subprocess.Popen(
                [sys.executable, "-m", worker.__name__, *map(str, group)],
                env=environment,
                pass_fds=group,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a process group that can be killed as a whole, and that Ctrl-C does not reach
            )
            stack.callback(_kill, parent)
        for _, remote in pairs:
            remote.close()  # or reading would not end when a worker does
        yield {name: Process(folder, local, output) for (name, folder), (local, _) in zip(folders.items(), pairs)}


def _kill(parent: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
