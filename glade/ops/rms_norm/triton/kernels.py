"""Rows of channels and their norms on a GPU. A program takes tiles of whole rows; all arithmetic is fp32.

The last rows are the first that are read, by all programs beside each other: those are what the product before wrote
last, so that some of them are still in the cache, and the product after begins with what is written last here.

With u = x / sqrt(mean(x^2) + eps):

    forward     y = weight * u * act(gate + bias);  or with a branch: total = x + branch, y = weight * u(total)
    backward    makes u again;  dx = (du - u mean(du u)) / sqrt(mean(x^2) + eps) (+ what came of the sum),
                du = weight * dy * act(gate + bias)

The gradient of the weight is summed over a program's rows here and over programs by `sum_of_programs`, in the order of
the rows.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from glade.ops.short_conv.triton.kernels import sigmoid


@triton.jit
def columns_of(n: tl.constexpr, BN: tl.constexpr):
    """Of a row, and which of them are there and not only to fill up a power of two."""
    columns = tl.arange(0, BN)
    inside = columns < BN  # all: known when this is compiled
    if n < BN:
        inside = columns < n
    return columns, inside


@triton.jit
def offsets(rows, columns, heads: tl.constexpr, token_stride, head_stride):
    """Where elements lie: row r is head r % heads of token r // heads."""
    starts = (rows // heads).to(tl.int64) * token_stride + (rows % heads) * head_stride
    return starts[:, None] + columns[None, :]


@triton.jit
def inverse_rms(x, n, eps):
    return tl.rsqrt(tl.sum(x * x, 1) / n + eps)[:, None]


@triton.jit
def rms_norm_kernel(
    x, x_token, x_head, other, other_token, other_head, weight, bias, y, total, num_rows, eps,
    heads: tl.constexpr, n: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * R + tl.arange(0, R)
    columns, inside = columns_of(n, BN)
    live = (rows < num_rows)[:, None] & inside[None, :]
    v = tl.load(x + offsets(rows, columns, heads, x_token, x_head), mask=live, other=0.0).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    if GATE or ADD:
        at_other = offsets(rows, columns, heads, other_token, other_head)
        z = tl.load(other + at_other, mask=live, other=0.0).to(tl.float32)
    if ADD:
        # the norm is that of the sum as it is kept
        v = (v + z).to(total.dtype.element_ty)
        tl.store(total + at, v, mask=live)
        v = v.to(tl.float32)
    u = v * inverse_rms(v, n, eps)
    u *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATE:
        if BIAS:
            z += tl.load(bias + (rows % heads)[:, None] * n + columns[None, :], mask=live, other=0.0).to(tl.float32)
        u *= sigmoid(z)
        if SILU:
            u *= z
    tl.store(y + at, u.to(y.dtype.element_ty), mask=live)


@triton.jit
def inputs_of(
    rows, wanted, columns, inside, dy, dy_token, dy_head, x, x_token, x_head, other, other_token, other_head,
    heads: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """A tile of x, dy and `other`, as they lie in memory; of x again where there is no other."""
    live = wanted[:, None] & inside[None, :]
    v = tl.load(x + offsets(rows, columns, heads, x_token, x_head), mask=live, other=0.0)
    d = tl.load(dy + offsets(rows, columns, heads, dy_token, dy_head), mask=live, other=0.0)
    z = v
    if OTHER:
        z = tl.load(other + offsets(rows, columns, heads, other_token, other_head), mask=live, other=0.0)
    return v, d, z


@triton.jit
def rms_norm_backward_kernel(
    dy, dy_token, dy_head, x, x_token, x_head, other, other_token, other_head, weight, bias,
    dx, dother, dother_token, dother_head, parts, parts_of_bias, num_rows, eps,
    heads: tl.constexpr, n: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`other` is the gate, or with ADD what came of the sum; SPLIT writes dx a second time, in the dtype of dother.
    With BIAS a tile is a whole number of tokens, so that each of its rows is always the same head.
    """
    columns, inside = columns_of(n, BN)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([R, BN], tl.float32)
    if BIAS:
        at_bias = (tl.arange(0, R) % heads)[:, None] * n + columns[None, :]
        shift = tl.load(bias + at_bias, mask=inside[None, :], other=0.0).to(tl.float32)
        of_bias = tl.zeros([R, BN], tl.float32)
    step = tl.num_programs(0) * R
    rows = (TILES - 1) * step + tl.program_id(0) * R + tl.arange(0, R)
    next_v, next_d, next_z = inputs_of(
        rows, rows < num_rows, columns, inside, dy, dy_token, dy_head, x, x_token, x_head,
        other, other_token, other_head, heads, GATE or ADD,
    )  # fmt: skip
    for _ in tl.range(0, TILES):
        v, d, z = next_v.to(tl.float32), next_d.to(tl.float32), next_z.to(tl.float32)
        # the next tile is asked for before this one is worked on: a program's own work hides its wait for memory
        next_v, next_d, next_z = inputs_of(
            rows - step, (rows >= step) & (rows - step < num_rows), columns, inside, dy, dy_token, dy_head,
            x, x_token, x_head, other, other_token, other_head, heads, GATE or ADD,
        )  # fmt: skip
        live = (rows < num_rows)[:, None] & inside[None, :]
        at = rows.to(tl.int64)[:, None] * n + columns[None, :]
        inverse = inverse_rms(v, n, eps)
        u = v * inverse
        if GATE:
            if BIAS:
                z += shift
            s = sigmoid(z)
            slope = s * (1 - s)
            act = s
            if SILU:
                slope = s + z * slope
                act = z * s
            at_dother = offsets(rows, columns, heads, dother_token, dother_head)
            dz = d * u * w * slope
            tl.store(dother + at_dother, dz.to(dother.dtype.element_ty), mask=live)
            if BIAS:
                of_bias += dz
            d *= act
        sums += d * u
        d *= w
        d = inverse * (d - u * (tl.sum(d * u, 1) / n)[:, None])
        if ADD:
            d += z
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=live)
        if SPLIT:
            tl.store(dother + at, d.to(dother.dtype.element_ty), mask=live)
        rows -= step
    tl.store(parts + tl.program_id(0).to(tl.int64) * n + columns, tl.sum(sums, 0), mask=inside)
    if BIAS:
        at_part = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None] * n + columns[None, :]
        tl.store(parts_of_bias + at_part, of_bias, mask=inside[None, :])
