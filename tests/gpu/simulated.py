"""Runs the command as if on GPUs, in a process of its own: `python -m tests.gpu.simulated SIMULATOR key=value ...`.

The simulator (`sim`, `nccl`) must be there before torch's CUDA is first asked for. Here its NCCL is taught the two backends
of a group, as `cpu:gloo,cuda:nccl`, and what was counted goes as JSON to the file that SIM_COUNTS names.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path


def prepare(simulator: Path) -> None:
    """Loads the simulator, which is built at first use; then torch.cuda is available."""
    found = importlib.util.spec_from_file_location("simulator_run", simulator / "run.py")
    run = importlib.util.module_from_spec(found)
    found.loader.exec_module(run)
    sys.path[:0] = [str(run.build().parent), str(simulator)]
    import sim  # noqa: F401

    if os.environ.get("WORLD_SIZE"):
        _two_backends()


def _two_backends() -> None:
    import torch.distributed as dist

    chooses = dist.distributed_c10d._get_object_coll_device
    import nccl

    start = nccl.REAL_INIT

    def init(backend: str | None = None, *args, **kwargs) -> None:
        kwargs.pop("device_id", None)  # the simulated backend joins its communicators at once anyway
        start(None if backend is None else backend.replace("nccl", "simnccl"), *args, **kwargs)

    dist.init_process_group = dist.distributed_c10d.init_process_group = init
    dist.distributed_c10d._get_object_coll_device = chooses


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
    sys.exit(main(sys.argv[1:]))
