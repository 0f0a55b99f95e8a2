"""A recipe on simulated GPUs, for what can be counted without a real one: copies, synchronisations, bytes."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHARED, environment

SIMULATOR = SHARED / "tools" / "simulated_gpu"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def simulated(tmp_path) -> Callable[..., list[dict]]:
    """Types the command on `processes` simulated GPUs; returns what was counted in each process. `visible`: the GPU that
    each sees alone, by name; else each sees all."""
    if not SIMULATOR.is_dir() or not shutil.which("g++"):
        pytest.skip("../shared or a C++ compiler is absent")

    def run(*settings: object, processes: int = 1, visible: tuple[str, ...] = ()) -> list[dict]:
        common = environment() | {"SIM_COUNTS": str(tmp_path / "counts"), "SIM_GPUS": str(1 if visible else processes)}
        if processes > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "TORCHELASTIC_RUN_ID": "none"}
            common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        line = [sys.executable, "-m", "tests.gpu.simulated", str(SIMULATOR), *map(str, settings)]
        running = []
        for rank in range(processes):
            own = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            own |= {"SIM_UUID": visible[rank]} if visible else {}
            with open(tmp_path / f"said-{rank}.txt", "w") as said:
                running.append(subprocess.Popen(line, cwd=ROOT, env=own, stdout=said, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(240) for process in running]
        finally:
            for process in running:
                process.kill()
        said = [(tmp_path / f"said-{rank}.txt").read_text() for rank in range(processes)]
        assert codes == [0] * processes, "\n".join(text[-3000:] for text in said)
        counts = [Path(f"{tmp_path}/counts-{rank}.json") for rank in range(processes)]
        return [json.loads(path.read_text()) | {"said": text} for path, text in zip(counts, said)]

    return run
