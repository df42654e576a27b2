"""Which ptxas assembles the kernels.

Triton 3.6 carries two: 12.8, which it uses up to Hopper, and 12.9 for Blackwell. With 12.8 the descriptors of `wgmma`
operands come out wrong in some kernels (wrong results, the same each time, or reads outside shared memory; right with
`DISABLE_PTXAS_OPT=1`, right with 12.9 and 13.0: docs/log.md). So the newer of the two is made Triton's choice, for the
whole process, unless the user has set TRITON_PTXAS_PATH.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false

import os

FIRST_RIGHT = (12, 9)


def choose_assembler() -> None:
    from triton import knobs
    from triton.backends.nvidia import compiler

    if "TRITON_PTXAS_PATH" in os.environ or _version(knobs.nvidia.ptxas) >= FIRST_RIGHT:
        return
    newer = getattr(knobs.nvidia, "ptxas_blackwell", None)
    if newer is not None and _version(newer) >= FIRST_RIGHT:
        knobs.nvidia.ptxas = newer.path
        compiler.get_ptxas_version.cache_clear()  # part of the key under which compiled kernels are kept


def _version(tool) -> tuple[int, ...]:
    return tuple(int(x) for x in tool.version.split("."))
