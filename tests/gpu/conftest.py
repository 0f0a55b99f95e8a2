"""Runs a recipe on simulated GPUs, which count copies, synchronisations and bytes."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import ROOT, SHARED, environment

SIMULATOR = SHARED / "tools" / "simulated_gpu"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def simulated(tmp_path) -> Callable[..., list[dict]]:
    """A function that runs the command on `processes` simulated GPUs and returns the counters of each process. `visible`: the
    name of the only GPU that each process sees; by default all processes see all GPUs."""
    if not SIMULATOR.is_dir() or not shutil.which("g++"):
        pytest.skip("../shared or a C++ compiler is absent")

    def run(*settings: object, processes: int = 1, visible: tuple[str, ...] = ()) -> list[dict]:
        common = environment() | {"SIM_COUNTS": str(tmp_path / "counts"), "SIM_GPUS": str(1 if visible else processes)}
        if processes > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "TORCHELASTIC_RUN_ID": "none"}
            common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        command = [sys.executable, "-m", "tests.gpu.simulated", str(SIMULATOR), *map(str, settings)]
        running = []
        for rank in range(processes):
            variables = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            variables |= {"SIM_UUID": visible[rank]} if visible else {}
            with open(tmp_path / f"output-{rank}.txt", "w") as file:
                running.append(
                    subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)
                )
        try:
            codes = [process.wait(240) for process in running]
        finally:
            for process in running:
                process.kill()
        outputs = [(tmp_path / f"output-{rank}.txt").read_text() for rank in range(processes)]
        assert codes == [0] * processes, "\n".join(output[-3000:] for output in outputs)
        counts = [json.loads((tmp_path / f"counts-{rank}.json").read_text()) for rank in range(processes)]
        return [count | {"output": output} for count, output in zip(counts, outputs)]

    return run
