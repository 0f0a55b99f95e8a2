"""A model of the time that stages take on GPUs: prints the tables of docs/scaling.md.

    python benchmarks/scaling.py [--disk 10] [--samples 128]

Each term is a count of the code (floating-point operations, bytes, launches, collectives) divided by a rate. The counts of
launches are those that tests/gpu/test_simulated.py asserts; the rates were measured on one H200, or are assumptions, as stated.
"""

import argparse
import math
from dataclasses import dataclass

PRODUCT = 790e12  # bf16 operations per second of a large product, measured
SHARE = 0.6  # of that rate, which a model's forward reaches: assumed
FP32 = 50e12  # operations per second of a float32 product
MEMORY = 4.3e12  # bytes per second of a copy on the device, measured
LINK = 55e9  # bytes per second from the host to a device, measured
NVLINK, NETWORK = 300e9, 40e9  # bytes per second of an all-reduce inside a node and between nodes: assumed
LAUNCH = 6e-6  # seconds of the host for a launch: assumed
HOST = 1e-3  # seconds of a collective of objects on the host, between nodes twice that: assumed
START = 15.0  # seconds until the first layer: imports, the process group, tokens
NODE = 8  # GPUs

FORWARD = 100  # launches of one forward of a layer, with the sums over its inputs
SELECT = 120  # bytes of memory traffic per weight for the scores, the mask, its check, its packing and the output error
COLUMNS = 128  # of one kernel of SparseGPT
TILE = 512  # rows of one product of SparseGPT's errors with the later columns


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    hidden: int
    inner: int
    layers: int
    kv: int  # width of keys and values
    vocabulary: int

    @property
    def weights(self) -> int:
        """Of a layer."""
        return 2 * self.hidden**2 + 2 * self.hidden * self.kv + 3 * self.hidden * self.inner

    @property
    def inputs(self) -> int:
        """The width of the different inputs of its matrices: of q/k/v, o, gate/up and down."""
        return 3 * self.hidden + self.inner

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(rows, inputs) of the matrices with the same input."""
        hidden, inner = self.hidden, self.inner
        return (hidden + 2 * self.kv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)

    @property
    def rows_by_inputs_squared(self) -> float:
        return sum(rows * inputs**2 for rows, inputs in self.groups)


SHAPES = {
    "7B": Shape(4096, 11008, 32, 4096, 32000),
    "70B": Shape(8192, 28672, 80, 1024, 128256),
    "405B": Shape(16384, 53248, 126, 1024, 128256),
}
GPUS = (1, 8, 64)


def forward(shape: Shape, tokens: float, length: int) -> float:
    """Floating-point operations of one layer; attention is causal."""
    return 2 * shape.weights * tokens + 2 * tokens * length * shape.hidden


def prune(shape: Shape, gpus: int, samples: int, length: int, disk: float, method: str = "wanda") -> dict[str, float]:
    """Seconds of each term of a layer. Those of `beside` run at the same time as the forwards."""
    mine = math.ceil(samples / gpus)  # the rank with the most samples decides
    terms = {
        "forwards": max(2 * forward(shape, mine * length, length) / (SHARE * PRODUCT), 2 * mine * FORWARD * LAUNCH),
        "statistics": 2 * mine * length * shape.inputs / MEMORY,
        "masks": SELECT * shape.weights / MEMORY,
        "exchange": 0.0,
    }
    if gpus > 1:
        sums = 8 * (shape.inputs if method == "wanda" else sum(n * n / 2 for n in (*[shape.hidden] * 3, shape.inner)))
        terms["exchange"] = 3 * HOST * (2 if gpus > NODE else 1) + 2 * sums / (NETWORK if gpus > NODE else NVLINK)
    if method == "sparsegpt":
        squares = 3 * shape.hidden**2 + shape.inner**2
        terms["statistics"] = mine * length * squares * 9 / 8 / (SHARE * PRODUCT)
        cubes = 3 * shape.hidden**3 + shape.inner**3
        # Cholesky and the inverse of the factor take a third of the cube each, at a third of a product's rate, on each rank
        terms["factors"] = 2 * cubes / FP32
        launches = sum(inputs / COLUMNS * (3 + rows / gpus / TILE) for rows, inputs in shape.groups)
        terms["columns"] = launches * LAUNCH + shape.rows_by_inputs_squared / gpus / FP32
    if method == "least squares":
        squares = 3 * shape.hidden**2 + shape.inner**2
        terms["statistics"] = mine * length * squares * 9 / 8 / (SHARE * PRODUCT)
        terms["iterations"] = 30 * 2 * shape.rows_by_inputs_squared / gpus / FP32
    return terms


def beside(shape: Shape, gpus: int, disk: float) -> dict[str, float]:
    """Seconds of a layer's copies, in the background. All GPUs of a node read its memory, and all nodes write to one disk."""
    size = 2 * shape.weights
    return {"reading": size / LINK, "writing": size / disk}


def layer_seconds(shape: Shape, gpus: int, samples: int, length: int, disk: float, method: str) -> float:
    return max(sum(prune(shape, gpus, samples, length, disk, method).values()), *beside(shape, gpus, disk).values())


def prune_table(samples: int, length: int, disk: float) -> None:
    methods = ("wanda", "sparsegpt", "least squares")
    print("| model | method | GPUs | seconds | of linear | a layer, ms | largest terms of a layer, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, shape in SHAPES.items():
        for method in methods:
            alone = layer_seconds(shape, 1, samples, length, disk, method)
            for gpus in GPUS:
                terms = prune(shape, gpus, samples, length, disk, method)
                seconds = layer_seconds(shape, gpus, samples, length, disk, method)
                writing = beside(shape, gpus, disk)
                largest = sorted((terms | writing).items(), key=lambda item: -item[1])[:3]
                listed = ", ".join(f"{term} {1e3 * value:.0f}" for term, value in largest)
                total = START + shape.layers * seconds
                share = alone / gpus / seconds
                print(f"| {name} | {method} | {gpus} | {total:.0f} | {share:.2f} | {1e3 * seconds:.0f} | {listed} |")


def others_table(length: int, disk: float) -> None:
    """A step of masked LoRA with checkpointed activations on `length` tokens for each GPU; the perplexity of WikiText-2."""
    print("| model | GPUs | LoRA: a step, s | of which gathering (FSDP) | WikiText-2, s | writing the model, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    text = 341_000  # tokens of WikiText-2's test split
    for name, shape in SHAPES.items():
        head = 2 * shape.hidden * shape.vocabulary
        size = 2 * (shape.layers * shape.weights + 2 * shape.hidden * shape.vocabulary)
        for gpus in GPUS:
            compute = 3 * (shape.layers * forward(shape, length, length) + head * length) / (SHARE * PRODUCT)
            sharded = size > 100e9  # more than a GPU holds
            gather = 2 * size / (NETWORK if gpus > NODE else NVLINK) if sharded and gpus > 1 else 0.0
            step = f"{max(compute, gather):.2f}" if gpus > 1 or not sharded else "too large"
            perplexity = (shape.layers * forward(shape, text / gpus, length) + head * text / gpus) / (SHARE * PRODUCT)
            if sharded:  # layer by layer
                perplexity = max(perplexity, size / LINK)
            print(f"| {name} | {gpus} | {step} | {gather:.2f} | {perplexity:.1f} | {size / disk:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--disk", type=float, default=10.0, help="GB/s that all nodes together can write")
    asked = parser.parse_args()
    prune_table(asked.samples, asked.seq_len, asked.disk * 1e9)
    print()
    others_table(asked.seq_len, asked.disk * 1e9)


if __name__ == "__main__":
    main()
