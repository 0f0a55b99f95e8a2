"""Compiles the kernel of the column loop for GPUs that need not be here: `python -m tests.pruning.compile_obs 80 90`.

Prints a line for each variant: compute capability, whether it selects, whether its score is squared; the stack in bytes. Not
with TRITON_INTERPRET=1.
"""

import sys

from pipeline.pruning import obs_triton
from tests.compact.compile_kernels import compiled, stack

POINTERS = dict.fromkeys(("weight", "factor", "inverse", "scale", "error"), "*fp32") | {"kept": "*u8"}
TILE = {"R": obs_triton.ROWS, "B": obs_triton.BLOCK, "warps": 1}


def main(capabilities: list[str]) -> None:
    for capability in map(int, capabilities):
        for selects, squared, n, m in (
            (False, False, 1, 1),
            (True, True, 2, 4),
            (True, False, 2, 4),
            (True, True, 4, 8),
        ):
            constants = TILE | {"SELECTS": selects, "SQUARED": squared, "N": n, "M": m}
            made = compiled(obs_triton._block_kernel, POINTERS, capability, constants)
            print(capability, selects, squared, stack(made.asm["cubin"]))


if __name__ == "__main__":
    main(sys.argv[1:])
