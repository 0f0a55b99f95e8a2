"""Compiles the Triton kernels for GPUs that need not be here: `python -m tests.compact.compile_kernels 80 90`.

Prints a line for each: compute capability, name, dtype, whether the values are int8; of the tile (rows, bytes) how many lanes
of a warp lie along the bytes; the stack in bytes. Not with TRITON_INTERPRET=1.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

from pipeline.compact import kernels_triton as kernels

ROWS, WIDTH = 4096, 128
POINTERS = {"words": "*i32", "bases": "*i16", "offsets": "*i64", "scales": "*fp32"}


def compiled(kernel: Any, kinds: dict[str, str], capability: int, constants: dict) -> Any:
    """`kinds`: the types of the pointers. Other arguments are `constants` or int32."""
    warps = constants.pop("warps")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    # as the launcher finds them: tensors are aligned, sizes are multiples of 16
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    named = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, signature, constexprs=named, attrs=aligned)
    options = {"num_warps": warps, "num_stages": 2}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    # Triton reorders a reshaped tensor that only reductions read; then tl.argmin gives the place in another order
    assert "allow_reorder" not in made.asm["ttgir"], kernel
    return made


def stack(cubin: bytes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout + usage.stderr).group(1))


def main(capabilities: list[str]) -> None:
    for capability in map(int, capabilities):
        for dtype, is_int8 in (("bf16", False), ("fp16", False), ("fp32", False), ("bf16", True)):
            kinds = POINTERS | dict.fromkeys(("x", "bias", "out", "values"), f"*{dtype}")
            kinds |= {"values": "*i8"} if is_int8 else {}
            tiles = {"_expand_kernel": {"R": 4, "B": 64, "warps": 4}}
            for name, choose in (("_product_kernel", kernels.one_token), ("_products_kernel", kernels.few_tokens)):
                height, chunk, warps = choose(ROWS, WIDTH)
                tiles[name] = {"R": height, "B": chunk, "CHUNKS": WIDTH * 4 // chunk, "warps": warps, "HAS_BIAS": True}
            tiles["_products_kernel"]["N"] = kernels.FEW
            if dtype == "fp32":
                del tiles["_products_kernel"]
            for name, constants in tiles.items():
                made = compiled(getattr(kernels, name), kinds, capability, constants | {"HAS_SCALES": is_int8})
                layout = re.search(r"tensor<\d+x\d+x!tt.ptr<i32>, (#\w+)>", made.asm["ttgir"]).group(1)
                lanes = re.search(rf"{layout} = .*threadsPerWarp = \[\d+, (\d+)\]", made.asm["ttgir"]).group(1)
                print(capability, name, dtype, is_int8, lanes, stack(made.asm["cubin"]))


if __name__ == "__main__":
    main(sys.argv[1:])
