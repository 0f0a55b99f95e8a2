"""Runs the command on simulated GPUs: `python -m tests.gpu.simulated SIMULATOR key=value ...`.

The simulator (modules `sim` and `nccl`) must be loaded before torch's CUDA is used. This module adds support for process groups
with two backends (`cpu:gloo,cuda:nccl`) to its NCCL, and writes the counters as JSON to the file named by SIM_COUNTS.
"""

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from pipeline.commands.main import leave


def prepare(simulator: Path) -> None:
    """Loads the simulator, which makes torch.cuda available. Compiles it at first use."""
    spec = importlib.util.spec_from_file_location("simulator_run", simulator / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    with FileLock(Path(tempfile.gettempdir()) / "simulated-gpu.lock"):  # other processes may start at the same time
        built = run.build()
    sys.path[:0] = [str(built.parent), str(simulator)]
    rank = os.environ.get("LOCAL_RANK", "0")
    if os.environ.get("SIM_GPUS") == "1":
        os.environ["LOCAL_RANK"] = "0"  # the simulator reads its GPU index from this variable
    import sim

    if os.environ.get("SIM_GPUS") == "1":
        os.environ["LOCAL_RANK"], sim.cu.current_device = rank, lambda: 0
    sim.Props.uuid = os.environ.get("SIM_UUID", rank)
    if os.environ.get("WORLD_SIZE"):
        _support_two_backends()


def _support_two_backends() -> None:
    """Makes `cpu:gloo,cuda:nccl` use the simulator's NCCL, which then passes CPU tensors to gloo instead of refusing them."""
    import nccl
    import torch.distributed as dist

    refuse = nccl.chk

    def init(backend: str | None = None, *args, **kwargs) -> None:
        if backend != "cpu:gloo,cuda:nccl":
            nccl.init(backend, *args, **kwargs)
            return
        nccl.chk = _check(refuse)
        dist.distributed_c10d._get_object_coll_device = lambda group=None: "cpu"
        kwargs.pop("device_id")  # only creates communicators early, as the simulated ones are
        nccl.REAL_INIT("simnccl", *args, **kwargs)

    dist.init_process_group = dist.distributed_c10d.init_process_group = init


def _check(refuse: Callable) -> Callable:
    import nccl

    def check(tensors: list, name: str) -> None:
        if all(tensor.is_cpu for tensor in tensors):
            nccl.COUNT["host"] = nccl.COUNT.get("host", 0) + 1
        else:
            refuse(tensors, name)

    return check


def main(arguments: list[str]) -> int:
    prepare(Path(arguments[0]))
    import sim

    import launch

    sys.argv = ["launch.py", *arguments[1:]]
    code = launch.main()
    counts = sim.C.stats() | {"kernels": sim.C.counts()}
    if os.environ.get("WORLD_SIZE"):
        import nccl

        counts["collectives"] = nccl.COUNT
    if path := os.environ.get("SIM_COUNTS"):
        Path(f"{path}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(counts))
    return code


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
