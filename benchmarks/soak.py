"""Nine consecutive runs in one process: memory and open files must not grow from run to run.

python benchmarks/soak.py --work DIR
"""

import argparse
import gc
import sys
import threading
from itertools import product
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chaos import SHORT
from pipeline.settings import reader
from pipeline.stages import runner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    process, rows = psutil.Process(), []
    for method, sparsity in product(("wanda", "magnitude", "sparsegpt"), ("2of4", "4of8", "0.5")):
        chosen = (f"prune.method={method}", f"prune.sparsity={sparsity}", f"run_dir={work}/{method}_{sparsity}")
        runner.run(reader.load([*SHORT, *chosen]))
        gc.collect()
        memory = process.memory_full_info().uss / 2**20
        rows.append((memory, process.num_fds(), threading.active_count()))
        print(f"| {len(rows)} | {method} {sparsity} | {memory:.0f} MiB | {rows[-1][1]} | {rows[-1][2]} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
