"""The small kernels of a decode step: token vectors, norms that stand alone, positions."""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from glade.infer.captured.kernels.heads import LAYER, norm_factors
from glade.infer.captured.kernels.overlap import wait


@triton.jit
def embed_kernel(
    ids, slots, positions, table, scales, position_table, out, out_stride, D,
    BD: tl.constexpr, INT8: tl.constexpr, LEARNED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program a row: the vector of its token, and of its position if those are learned."""
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    id = tl.load(ids + row)
    x = tl.load(table + id * D + columns, mask=inside, other=0).to(tl.float32)
    if INT8:
        x *= tl.load(scales + id)
    if LEARNED:
        position = tl.load(positions + tl.load(slots + row))
        x += tl.load(position_table + position * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_kernel(
    x,
    x_stride,
    weight,
    bias,
    eps,
    out,
    out_stride,
    D,
    BD: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program a row: the norm of x, which `out` may be."""
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM == LAYER:
        # the mean first: a difference of large sums would lose what is left
        mean = tl.sum(value, 0) / D
        centred = tl.where(inside, value - mean, 0.0)
        value = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    else:
        _, factor = norm_factors(0.0, tl.sum(value * value, 0), D, eps, NORM)
        value *= factor
    if AFFINE:
        value *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if NORM == LAYER:
            value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def advance_kernel(positions, slots, live, OVERLAP: tl.constexpr):
    """A program a row: one token more, or 0 where nobody sits."""
    wait(OVERLAP)
    row = tl.program_id(0)
    at = positions + tl.load(slots + row)
    tl.store(at, (tl.load(at) + 1) * tl.load(live + row))
