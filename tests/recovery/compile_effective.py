"""Compiles the kernels of the masked LoRA for GPUs that need not be here: `python -m tests.recovery.compile_effective 80 90`.

Prints a line for each variant: compute capability, kernel, dtype; the stack in bytes. Not with TRITON_INTERPRET=1.
"""

import sys

from pipeline.recovery import effective_triton as kernels
from tests.compact.compile_kernels import compiled, stack

POINTERS = {"left": "*fp32", "right": "*fp32", "bits": "*u8", "wrong": "*i32", "size": "i32", "scale": "fp32"}
TILE = {"HEIGHT": kernels.HEIGHT, "WIDTH": kernels.WIDTH, "RANKS": kernels.RANKS}


def main(capabilities: list[str]) -> None:
    for capability in map(int, capabilities):
        for dtype, chunks, has_base in (("bf16", 1, True), ("fp16", 2, True), ("fp32", 4, False)):
            kinds = POINTERS | dict.fromkeys(("base", "out", "values"), f"*{dtype}")
            constants = TILE | {"CHUNKS": chunks, "HAS_BASE": has_base, "warps": kernels.WARPS}
            made = compiled(kernels._effective_kernel, kinds, capability, constants)
            print(capability, "effective", dtype, stack(made.asm["cubin"]))
            made = compiled(kernels._mask_kernel, kinds, capability, {"BLOCK": kernels.BLOCK, "warps": kernels.WARPS})
            print(capability, "mask", dtype, stack(made.asm["cubin"]))


if __name__ == "__main__":
    main(sys.argv[1:])
