"""Measures compact matrices, and the decoding of a model of them, on this machine's GPU, against dense ones. Needs no files.

    python benchmarks/compact_gpu.py               # the products by shape, and decoding, of a 7B Llama; a minute and a half
    python benchmarks/compact_gpu.py --tune        # times the tiles of the Triton kernels instead

Kernel time: CUDA graphs that take each of several copies of a matrix in turn, so that it comes from memory and launches do not
count. GB/s: the bytes of the form, inputs and outputs in that time. Call: with its launch, as without graphs. Error: the
largest difference to a product in float32, relative to the largest number. --out=FILE: adds each row to a file as JSON.
Decoding: four layers with random weights, a step of one token for each text, without graphs (eager) and with one.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compact_gpu_decoding import decoding
from benchmarks.compact_gpu_timing import another, call_seconds, forms_of, graph_seconds, linear, matrix
from pipeline.compact import gpu_weight
from pipeline.compact.forms import FLUSH, microseconds
from pipeline.compact.gpu_weight import error_of
from pipeline.runtime import hardware

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # of a 7B Llama
PATTERNS = ("0.5", "2of4", "0.7")
TOKENS = (1, 4, 16, 512)
RESIDENT = 256 << 20  # bytes of copies: several times any cache
TILES_ONE = [(rows, 32 * warps, warps) for warps in (2, 4, 8, 16) for rows in (2, 4, 8, 16)]
TILES_FEW = [(8, 32, 1), (8, 64, 2), (8, 128, 4), (8, 256, 8), (16, 32, 1), (16, 64, 2), (16, 128, 4), (32, 64, 4)]


def products(write: Callable[[dict], None]) -> None:
    print("\n| matrix | pattern | tokens | form | MiB | kernel, µs | GB/s | × dense | call, µs | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for rows, columns in SHAPES:
        for pattern in PATTERNS:
            dense_seconds: dict[int, float] = {}
            for form, weight in forms_of(rows, columns, pattern):
                reference = (weight if isinstance(weight, Tensor) else weight._rows(0, rows)).float()
                copies = [weight, *(another(weight) for _ in range(RESIDENT // weight.nbytes))]
                linears = [linear(copy) for copy in copies]
                for tokens in TOKENS:
                    x = torch.randn(tokens, columns, device="cuda").bfloat16()
                    error = error_of(linears[0](x), F.linear(x.float(), reference).double())

                    def run(linears=linears, x=x) -> None:
                        for apply in linears:
                            apply(x)

                    try:
                        seconds = graph_seconds(run) / len(linears)
                    except RuntimeError as problem:
                        print(
                            f"no graph of {form} ({str(problem).splitlines()[0]}); behind a flush of the caches instead:"
                        )
                        flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
                        seconds = microseconds(functools.partial(linears[0], x), flush) / 1e6
                    called = call_seconds(run) / len(linears)
                    dense_seconds.setdefault(tokens, seconds)
                    moved = weight.nbytes + x.nbytes + 2 * rows * tokens
                    row = {
                        "shape": [rows, columns],
                        "pattern": pattern,
                        "tokens": tokens,
                        "form": form,
                        "bytes": weight.nbytes,
                    }
                    row |= {"seconds": seconds, "gain": dense_seconds[tokens] / seconds, "call": called, "error": error}
                    write(row)
                    cells = [f"{rows} x {columns}", pattern, str(tokens), form, f"{weight.nbytes / 2**20:.1f}"]
                    cells += [f"{1e6 * seconds:.1f}", f"{moved / seconds / 1e9:.0f}", f"{row['gain']:.2f}"]
                    print("| " + " | ".join([*cells, f"{1e6 * called:.1f}", f"{error:.1e}"]) + " |", flush=True)
                del copies, linears, reference


def tune() -> None:
    """Prints the times of the kernels' tiles: (rows, bytes, warps)."""
    from pipeline.compact import kernels_triton

    for rows, columns in SHAPES:
        weight = matrix(rows, columns, "0.5")
        copies = [weight, *(another(weight) for _ in range(RESIDENT // weight.nbytes))]
        for name, tokens, tiles in (("one_token", 1, TILES_ONE), ("few_tokens", 16, TILES_FEW)):
            x = torch.randn(tokens, columns, device="cuda").bfloat16()
            usual, times = getattr(kernels_triton, name), {}
            for tile in tiles:
                setattr(kernels_triton, name, lambda rows, width, tile=tile: tile)
                try:
                    times[tile] = 1e6 * graph_seconds(lambda: [copy.linear(x) for copy in copies]) / len(copies)  # noqa: B023
                except Exception as error:  # of Triton's compiler
                    print(f"{tile}: {str(error).splitlines()[0][:200]}")
            setattr(kernels_triton, name, usual)
            ranked = ", ".join(f"{tile} {value:.1f}" for tile, value in sorted(times.items(), key=lambda item: item[1]))
            print(
                f"{rows} x {columns}, {tokens} tokens, now {usual(rows, -(-columns // 32))}; µs: {ranked}", flush=True
            )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time the tiles of the kernels, two minutes")
    parser.add_argument("--layers", type=int, default=4, help="of the model that decodes; none: 0")
    parser.add_argument("--out", type=Path, help="a file for rows of JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")

    def write(row: dict) -> None:
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(row) + "\n")

    started = time.perf_counter()
    torch.manual_seed(0)
    served = gpu_weight.KERNELS.load(torch.device("cuda", 0)) is not None
    cusparselt = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    print(
        f"{hardware.machine()}; torch {torch.__version__}, Triton kernels: {served}, cuSPARSELt: {cusparselt}",
        flush=True,
    )
    if args.tune:
        tune()
    else:
        products(write)
        if args.layers:
            decoding(args.layers, write)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
