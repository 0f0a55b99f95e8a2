"""Compiles the kernel of exchanges for GPUs that need not be here: `python -m tests.pruning.compile_swap 80 90`.

Prints a line for each variant: compute capability, M, inputs read at a time; the stack in bytes. Not with TRITON_INTERPRET=1.
"""

import sys

from pipeline.pruning import swap_triton
from tests.compact.compile_kernels import compiled, stack

POINTERS = dict.fromkeys(("value", "weight", "product", "error", "gram", "diagonal", "blocks"), "*fp32")
KINDS = POINTERS | dict.fromkeys(("kept", "done"), "*u8") | {"smallest": "fp32"}


def main(capabilities: list[str]) -> None:
    for capability in map(int, capabilities):
        for group, inputs in ((4, 4096), (8, 11008), (2, 576), (None, 576), (None, 4096), (None, 11008)):
            constants = swap_triton.sizes(inputs, group)
            constants["warps"] = constants.pop("num_warps")
            made = compiled(swap_triton._swap_kernel, KINDS, capability, constants)
            print(capability, group, constants["C"], stack(made.asm["cubin"]))


if __name__ == "__main__":
    main(sys.argv[1:])
