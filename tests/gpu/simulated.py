"""Runs the command on a simulated GPU: `LOCAL_RANK=INDEX python -m tests.gpu.simulated SIMULATOR`.

Each line of its input is a JSON list of runs: their settings, environment, and files for the output and the counters. A run is
a forked process, because the imports take 10 s. The answer is a line with the list of their exit codes.

The simulator (modules `sim` and `nccl`) must be loaded before torch's CUDA is used, and then reads the index of the GPU. This
module adds support for process groups with two backends (`cpu:gloo,cuda:nccl`) to its NCCL.
"""

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from filelock import FileLock


def prepare(simulator: Path) -> None:
    """Loads the simulator, which makes torch.cuda available. Compiles it at first use."""
    spec = importlib.util.spec_from_file_location("simulator_run", simulator / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    with FileLock(Path(tempfile.gettempdir()) / "simulated-gpu.lock"):  # other processes may start at the same time
        built = run.build()
    sys.path[:0] = [str(built.parent), str(simulator)]
    import sim  # noqa: F401


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


def run(settings: list[str], environment: dict[str, str], output: str, counts: str) -> NoReturn:
    """Runs the command in this process, which then ends."""
    import sim

    import launch

    os.environ.clear()
    os.environ.update(environment)
    with open(output, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if environment["SIM_GPUS"] == "1":
        sim.cu.current_device = lambda: 0
    sim.Props.uuid = environment.get("SIM_UUID", environment.get("LOCAL_RANK", "0"))
    if "WORLD_SIZE" in environment:
        _support_two_backends()
    sys.argv = ["launch.py", *settings]
    code = launch.main()
    counted = sim.C.stats() | {"kernels": sim.C.counts()}
    if "WORLD_SIZE" in environment:
        import nccl

        counted["collectives"] = nccl.COUNT
    Path(counts).write_text(json.dumps(counted))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(simulator: Path) -> None:
    prepare(simulator)
    importlib.import_module("pipeline.stages.runner")  # and all stages
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            children.append(os.fork())
            if not children[-1]:
                run(**job)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
