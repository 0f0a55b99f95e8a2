"""Measures compact matrices, and the decoding of a model of them, on this machine's GPU, against dense ones. Needs no files.

    python benchmarks/compact_gpu.py               # the products by shape, and decoding, of a 7B Llama; a minute and a half
    python benchmarks/compact_gpu.py --tune        # times the tiles of the Triton kernels instead

Kernel time: CUDA graphs that take each of several copies of a matrix in turn, so that it comes from memory and launches do not
count. GB/s: the bytes of the form, inputs and outputs in that time. Call: with its launch, as without graphs. Error: the largest
difference to a product in float32, relative to the largest number. Each row is added to the file given by --out as JSON.
Decoding: four layers with random weights, a step of one token for each text, without graphs (eager) and with one.
"""

import argparse
import copy
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from pipeline.compact import compact_model, gpu_weight
from pipeline.compact.compact_weight import CompactWeight
from pipeline.compact.file_format import compress
from pipeline.compact.gpu_weight import GpuWeight, SemiStructuredWeight, error_of
from pipeline.runtime import hardware
from pipeline.sparsity.patterns import parse

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # of a 7B Llama
PATTERNS = ("0.5", "2of4", "0.7")
TOKENS = (1, 4, 16, 512)
FORMS = ("dense", "bitmask", "bitmask int8", "semi-structured")
RESIDENT = 256 << 20  # bytes of copies: several times any cache
REPLAYS = 5
CACHE = 512  # positions of the cache in decoding
STEPS = 40
TILES_ONE = [(rows, 32 * warps, warps) for warps in (2, 4, 8, 16) for rows in (2, 4, 8, 16)]
TILES_FEW = [(8, 32, 1), (8, 64, 2), (8, 128, 4), (8, 256, 8), (16, 32, 1), (16, 64, 2), (16, 128, 4), (32, 64, 4)]
Linear = Callable[[Tensor], Tensor]


def matrix(rows: int, columns: int, pattern: str, values: str = "exact") -> GpuWeight:
    weight = torch.randn(rows, columns, device="cuda") * columns**-0.5
    mask = parse(pattern).select(weight.abs())
    weight = (weight * mask).bfloat16().cpu()
    packed = compress("w", weight, mask.cpu() & (weight != 0), False, (pattern,), values)
    return GpuWeight.from_cpu(CompactWeight.from_compact(packed, torch.bfloat16), torch.device("cuda", 0))


def another(weight: CompactWeight | Tensor) -> CompactWeight | Tensor:
    """The same in memory of its own."""
    if isinstance(weight, Tensor):
        return weight.clone()
    found = copy.copy(weight)
    for name, value in vars(weight).items():
        if isinstance(value, Tensor):
            setattr(found, name, value.clone())
    return found


def linear(weight: CompactWeight | Tensor) -> Linear:
    return weight.linear if isinstance(weight, CompactWeight) else lambda x: F.linear(x, weight)


def graph_seconds(call: Callable[[], object], replays: int = REPLAYS) -> float:
    """The median time of a captured call. Raises `RuntimeError` if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(next_) for one, next_ in zip(events, events[1:])) / 1e3


def call_seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """The median time of a call with its launches, until the GPU has finished."""
    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def forms_of(rows: int, columns: int, pattern: str) -> Iterator[tuple[str, CompactWeight | Tensor]]:
    weight = matrix(rows, columns, pattern)
    dense = weight.dense()
    yield "dense", dense
    yield "bitmask", weight
    if pattern == PATTERNS[0]:
        yield "bitmask int8", matrix(rows, columns, pattern, "int8")
    if weight.is_2_of_4():
        try:
            yield "semi-structured", SemiStructuredWeight(dense, False)
        except (RuntimeError, NotImplementedError) as error:
            print(f"no semi-structured form: {str(error).splitlines()[0]}")


def products(write: Callable[[dict], None]) -> None:
    print("\n| matrix | pattern | tokens | form | MiB | kernel, µs | GB/s | × dense | call, µs | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for rows, columns in SHAPES:
        for pattern in PATTERNS:
            dense_seconds: dict[int, float] = {}
            for form, weight in forms_of(rows, columns, pattern):
                reference = (weight if isinstance(weight, Tensor) else weight._rows(0, rows)).float()
                copies = [weight, *(another(weight) for _ in range(RESIDENT // weight.nbytes))]
                linears = [linear(it) for it in copies]
                for tokens in TOKENS:
                    x = torch.randn(tokens, columns, device="cuda").bfloat16()
                    error = error_of(linears[0](x), F.linear(x.float(), reference).double())

                    def run(linears=linears, x=x) -> None:
                        for it in linears:
                            it(x)

                    try:
                        seconds = graph_seconds(run) / len(linears)
                    except RuntimeError as problem:
                        print(f"no graph of {form}: {str(problem).splitlines()[0]}")
                        continue
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
                    print(
                        f"| {rows} x {columns} | {pattern} | {tokens} | {form} | {weight.nbytes / 2**20:.1f} | {1e6 * seconds:.1f} "
                        f"| {moved / seconds / 1e9:.0f} | {row['gain']:.2f} | {1e6 * called:.1f} | {error:.1e} |",
                        flush=True,
                    )
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
                    times[tile] = 1e6 * graph_seconds(lambda: [it.linear(x) for it in copies]) / len(copies)  # noqa: B023
                except Exception as error:  # of Triton's compiler
                    print(f"{tile}: {str(error).splitlines()[0]}")
            setattr(kernels_triton, name, usual)
            ranked = ", ".join(f"{tile} {value:.1f}" for tile, value in sorted(times.items(), key=lambda item: item[1]))
            print(
                f"{rows} x {columns}, {tokens} tokens, now {usual(rows, -(-columns // 32))}; µs: {ranked}", flush=True
            )


def llama(layers: int, hidden: int = 4096, mlp: int = 11008, heads: int = 32, device: str = "cuda") -> nn.Module:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).bfloat16().eval()


def decoding_step(model: nn.Module, batch: int) -> Callable[[], Tensor]:
    """One token for each text, with a cache of `CACHE` positions of which all are attended to."""
    device = model.lm_head.weight.device
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    inputs = {"input_ids": torch.full((batch, 1), 5, device=device), "past_key_values": cache, "use_cache": True}
    inputs["position_ids"] = torch.full((1, 1), CACHE // 2, device=device)
    inputs["attention_mask"] = torch.ones(batch, 1, 1, CACHE, dtype=torch.bool, device=device)
    if "cache_position" in inspect.signature(model.model.forward).parameters:
        inputs["cache_position"] = torch.full((1,), CACHE // 2, device=device)
    return lambda: model(**inputs).logits


def decoding(layers: int, write: Callable[[dict], None]) -> None:
    print(f"\n| pattern | batch | form | eager, ms | graph, ms | × dense | GPU memory, MiB |  ({layers} layers)")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for pattern in PATTERNS:
        model = llama(layers)
        # the layers hold the same weights, each in memory of its own
        shapes = {
            name: it.weight.shape for name, it in model.model.layers[0].named_modules() if isinstance(it, nn.Linear)
        }
        weights = {name: dict(forms_of(*shape, pattern)) for name, shape in shapes.items()}
        gains: dict[int, float] = {}
        for form in FORMS:
            if not all(form in forms for forms in weights.values()):
                continue
            model = llama(layers)
            for number in range(layers):
                for name, forms in weights.items():
                    path = f"model.layers.{number}.{name}.weight"
                    if form == "dense":
                        model.get_parameter(path).data.copy_(forms[form])
                    else:
                        compact_model._attach(model, [path], another(forms[form]))
            used = sum(it.nbytes for it in model.parameters())
            used += sum(weight.nbytes for it in model.modules() for weight in it.__dict__.get("_compact", {}).values())
            for batch in (1, 4, 16):
                step = decoding_step(model, batch)
                eager = call_seconds(step, STEPS)
                try:
                    graph = graph_seconds(decoding_step(model, batch), STEPS)
                except RuntimeError as error:
                    print(f"no graph of a step: {str(error).splitlines()[0]}")
                    graph = float("nan")
                gains.setdefault(batch, graph)
                write(
                    {"decoding": pattern, "batch": batch, "form": form, "eager": eager, "graph": graph, "bytes": used}
                )
                print(
                    f"| {pattern} | {batch} | {form} | {1e3 * eager:.2f} | {1e3 * graph:.2f} | {gains[batch] / graph:.2f} "
                    f"| {used / 2**20:.0f} |",
                    flush=True,
                )
            del model


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
    served = gpu_weight.load(torch.device("cuda", 0)) is not None
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
