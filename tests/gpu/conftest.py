"""Runs a recipe on simulated GPUs, which count copies, synchronisations and bytes."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import ROOT, SHARED, environment

SIMULATOR = SHARED / "tools" / "simulated_gpu"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def simulators() -> Iterator[Callable[[dict[int, list[dict]]], list[int]]]:
    """A function that runs the jobs of each simulated GPU (`tests/gpu/simulated.py`), by its index; returns the exit codes.
    Starts the process of a GPU at first use."""
    servers: dict[int, subprocess.Popen] = {}

    def run(jobs: dict[int, list[dict]]) -> list[int]:
        for gpu in set(jobs) - set(servers):
            servers[gpu] = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.simulated", str(SIMULATOR)],
                cwd=ROOT,
                env=environment() | {"LOCAL_RANK": str(gpu), "SIM_GPUS": str(gpu + 1)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        for gpu, its_jobs in jobs.items():
            print(json.dumps(its_jobs), file=servers[gpu].stdin, flush=True)
        codes = []
        for gpu in jobs:
            if not select.select([servers[gpu].stdout], [], [], 240)[0]:
                stop()  # their next answers would be to these jobs
                pytest.fail("a run on a simulated GPU took more than 240 s")
            codes += json.loads(servers[gpu].stdout.readline())
        return codes

    def stop() -> None:
        while servers:
            _, server = servers.popitem()
            os.killpg(server.pid, signal.SIGKILL)
            server.communicate()

    yield run
    stop()


@pytest.fixture
def simulated(simulators, tmp_path) -> Callable[..., list[dict]]:
    """A function that runs the command on `processes` simulated GPUs and returns the counters of each process. `visible`: the
    name of the only GPU that each process sees; by default all processes see all GPUs."""
    if not SIMULATOR.is_dir() or not shutil.which("g++"):
        pytest.skip("../shared or a C++ compiler is absent")

    def run(*settings: object, processes: int = 1, visible: tuple[str, ...] = ()) -> list[dict]:
        common = environment() | {"SIM_GPUS": str(1 if visible else processes)}
        if processes > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "TORCHELASTIC_RUN_ID": "none"}
            common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        jobs: dict[int, list[dict]] = {}
        for rank in range(processes):
            variables = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            variables |= {"SIM_UUID": visible[rank]} if visible else {}
            files = {name: str(tmp_path / f"{name}-{rank}") for name in ("output", "counts")}
            job = {"settings": [str(setting) for setting in settings], "environment": variables, **files}
            jobs.setdefault(0 if visible else rank, []).append(job)
        codes = simulators(jobs)
        outputs = [(tmp_path / f"output-{rank}").read_text() for rank in range(processes)]
        assert codes == [0] * processes, "\n".join(output[-3000:] for output in outputs)
        counts = [json.loads((tmp_path / f"counts-{rank}").read_text()) for rank in range(processes)]
        return [count | {"output": output} for count, output in zip(counts, outputs)]

    return run
