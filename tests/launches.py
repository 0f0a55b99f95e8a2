"""Starts the command in forked processes: as with a launcher, without the seconds of imports."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import launch
from pipeline.runtime import processes
from pipeline.stages import runner
from tests.conftest import environment

FORK = multiprocessing.get_context("fork")


def fork(
    settings: tuple, log: Path, of: int = 1, nodes: int = 1, work: Callable[[int], None] | None = None
) -> list[BaseProcess]:
    """Starts the ranks of a launch on `nodes` pretended machines; each appends its output to `log/<rank>.txt`.

    `work(rank)`, if given, runs instead of the stages.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.mkdir(parents=True, exist_ok=True)
    running = [FORK.Process(target=_rank, args=(rank, of, nodes, port, settings, log, work)) for rank in range(of)]
    for process in running:
        process.start()
    return running


def end(running: list[BaseProcess], timeout: float | None = None) -> list[int]:
    """Waits for all processes; returns their exit codes."""
    for process in running:
        process.join(timeout)
    return [process.exitcode for process in running]


def run(settings: tuple, log: Path, of: int = 1, code: int = 0, work: Callable[[int], None] | None = None) -> str:
    """The output of all ranks, once they have ended with `code`."""
    running = fork(settings, log, of, work=work)
    codes = end(running, 300)
    for process in running:
        process.kill()  # of those that hang, whose code is None
    outputs = [(log / f"{rank}.txt").read_text() for rank in range(of)]
    assert codes == [code] * of, "\n".join(output[-3000:] for output in outputs)
    return "".join(outputs)


def _rank(rank: int, of: int, nodes: int, port: int, settings: tuple, log: Path, work: Callable | None) -> None:
    here = of // nodes
    os.environ |= environment()
    if of > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(of)}
        os.environ |= {"LOCAL_RANK": str(rank % here), "LOCAL_WORLD_SIZE": str(here)}
        os.environ |= {"GROUP_RANK": str(rank // here), "GROUP_WORLD_SIZE": str(nodes)}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    with open(log / f"{rank}.txt", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.enable(sys.stderr)  # pytest's writes where nobody looks
    torch.set_num_threads(1)
    if work:
        runner.run = lambda recipe: _together(recipe, lambda: work(rank))
    sys.argv = ["launch.py", *map(str, settings)]
    code = launch.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _together(recipe, work: Callable[[], None]) -> None:
    with processes.together(recipe.timeout_minutes):
        work()
