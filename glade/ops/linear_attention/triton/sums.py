"""The sum over what programs have left: the last step of a gradient that belongs to all tokens.

Programs cannot add to one number in a fixed order, so each leaves a part and this adds them up, always the same way.
torch's sum of so few numbers clears counters for its blocks first; here it is one kernel, which waits for nothing.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from glade.ops.linear_attention.triton.launch import device_of
from glade.ops.linear_attention.triton.launcher import start

COLUMNS = 8  # of a program, at least: 32 bytes, the least that memory hands out; so there are many programs
ROWS = 1024  # parts that a program reads at once
TILE = 512  # numbers that it reads at once, at least: few parts have many columns
LARGE_TILE, MANY_PROGRAMS = 4096, 512  # where there are many programs all the same


@triton.jit
def sum_kernel(parts, sums, num_parts, width, R: tl.constexpr, BC: tl.constexpr):
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([R, BC], tl.float32)
    for first in tl.range(0, num_parts, R):
        rows = first + tl.arange(0, R)
        live = (rows < num_parts)[:, None] & (columns < width)[None, :]
        total += tl.load(parts + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=live, other=0.0)
    tl.store(sums + columns, tl.sum(total, 0).to(sums.dtype.element_ty), mask=columns < width)


def sum_of_programs(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum over the first axis of parts [programs, ...] fp32, contiguous, rounded to `dtype` at the end."""
    sums = parts.new_empty(parts.shape[1:], dtype=dtype)
    if len(parts) == 0:
        return sums.zero_()
    if sums.numel() > 0:
        R = min(ROWS, 1 << (len(parts) - 1).bit_length())
        many = sums.numel() * R >= MANY_PROGRAMS * LARGE_TILE
        BC = max(COLUMNS, (LARGE_TILE if many else TILE) // R)
        with device_of(parts):
            start(
                sum_kernel, -(-sums.numel() // BC),
                parts, sums, len(parts), sums.numel(), R=R, BC=BC, num_warps=8 if R > 256 else 4,
            )  # fmt: skip
    return sums
