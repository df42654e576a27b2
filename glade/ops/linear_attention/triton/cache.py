"""What the L2 cache is told. It changes no result; Triton's interpreter, which has no assembler, leaves it out."""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def discard(start, NUM_BYTES: tl.constexpr):
    """What is at `start`, a multiple of 128 bytes, is not needed any more: it need not be written to memory.

    All that the program reads there must be read, by all its threads, before.
    """
    tl.debug_barrier()
    line = start.to(tl.int64) + tl.arange(0, NUM_BYTES // 128) * 128
    tl.inline_asm_elementwise(
        "discard.global.L2 [$1], 128; mov.u32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
    )
