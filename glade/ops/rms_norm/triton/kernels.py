"""Rows of channels and their norms on a GPU. A program takes tiles of whole rows; all arithmetic is fp32.

With u = x / sqrt(mean(x^2) + eps):

    forward     y = weight * u * act(gate);  or with a branch: total = x + branch, y = weight * u(total)
    backward    makes u again;  dx = (du - u mean(du u)) / sqrt(mean(x^2) + eps) (+ what came of the sum),
                du = weight * dy * act(gate)

The gradient of the weight is summed over a program's rows here and over programs by torch, in the order of the rows.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl


@triton.jit
def row_offsets(rows, heads, token_stride, head_stride):
    """Where rows begin: row r is head r % heads of token r // heads."""
    return (rows // heads).to(tl.int64) * token_stride + (rows % heads) * head_stride


@triton.jit
def inverse_rms(x, n, eps):
    return tl.rsqrt(tl.sum(x * x, 1) / n + eps)[:, None]


@triton.jit
def rms_norm_kernel(
    x, x_token, x_head, other, other_token, other_head, weight, y, total, num_rows, heads, n, eps,
    GATE: tl.constexpr, SILU: tl.constexpr, ADD: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, BN)
    live = (rows < num_rows)[:, None] & (columns < n)[None, :]
    v = tl.load(x + row_offsets(rows, heads, x_token, x_head)[:, None] + columns[None, :], mask=live, other=0.0)
    v = v.to(tl.float32)
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    if GATE or ADD:
        at_other = row_offsets(rows, heads, other_token, other_head)[:, None] + columns[None, :]
        z = tl.load(other + at_other, mask=live, other=0.0).to(tl.float32)
    if ADD:
        # the norm is that of the sum as it is kept
        v = (v + z).to(total.dtype.element_ty)
        tl.store(total + at, v, mask=live)
        v = v.to(tl.float32)
    u = v * inverse_rms(v, n, eps)
    u *= tl.load(weight + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    if GATE:
        u *= tl.sigmoid(z)
        if SILU:
            u *= z
    tl.store(y + at, u.to(y.dtype.element_ty), mask=live)


@triton.jit
def rms_norm_backward_kernel(
    dy, dy_token, dy_head, x, x_token, x_head, other, other_token, other_head, weight,
    dx, dother, dother_token, dother_head, parts, num_rows, heads, n, eps,
    GATE: tl.constexpr, SILU: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr,
    R: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`other` is the gate, or with ADD what came of the sum; SPLIT writes dx a second time, in the dtype of dother."""
    columns = tl.arange(0, BN)
    w = tl.load(weight + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([R, BN], tl.float32)
    for tile in tl.range(0, TILES):
        rows = (tl.program_id(0) * TILES + tile) * R + tl.arange(0, R)
        live = (rows < num_rows)[:, None] & (columns < n)[None, :]
        at = rows.to(tl.int64)[:, None] * n + columns[None, :]
        v = tl.load(x + row_offsets(rows, heads, x_token, x_head)[:, None] + columns[None, :], mask=live, other=0.0)
        d = tl.load(dy + row_offsets(rows, heads, dy_token, dy_head)[:, None] + columns[None, :], mask=live, other=0.0)
        v, d = v.to(tl.float32), d.to(tl.float32)
        if GATE or ADD:
            at_other = row_offsets(rows, heads, other_token, other_head)[:, None] + columns[None, :]
            z = tl.load(other + at_other, mask=live, other=0.0).to(tl.float32)
        inverse = inverse_rms(v, n, eps)
        u = v * inverse
        if GATE:
            s = tl.sigmoid(z)
            slope = s * (1 - s)
            act = s
            if SILU:
                slope = s + z * slope
                act = z * s
            at_dother = row_offsets(rows, heads, dother_token, dother_head)[:, None] + columns[None, :]
            tl.store(dother + at_dother, (d * u * w * slope).to(dother.dtype.element_ty), mask=live)
            d *= act
        sums += d * u
        d *= w
        d = inverse * (d - u * (tl.sum(d * u, 1) / n)[:, None])
        if ADD:
            d += z
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=live)
        if SPLIT:
            tl.store(dother + at, d.to(dother.dtype.element_ty), mask=live)
    tl.store(parts + tl.program_id(0).to(tl.int64) * n + columns, tl.sum(sums, 0), mask=columns < n)
