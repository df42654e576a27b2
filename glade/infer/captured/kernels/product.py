"""A linear map of a few rows, with what stands before and after it: norm, convolution, activation, residual sum.

    y = act(norm(x) W^T + b)    or    y += act(norm(x) W^T + b)

Two kernels. One row is bound by reading W: `vector_kernel` multiplies in fp32 as W comes from memory. Several rows go
through tensor cores: `tile_kernel`. An RMS norm needs no pass of its own there: x meets its weight on the way in, and
the answer is divided by the root mean square, summed in the same pass. Many rows go through torch's product, with a
norm before it and `finish_kernel` behind it.

W is [N, K] in x's dtype, or int8 with a scale a row. All else is fp32.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from glade.infer.captured.kernels.overlap import wait

# what is done to x
AS_IT_IS, SILU_OF, RMS, RMS_EPS_OUTSIDE = (tl.constexpr(i) for i in range(4))
# what is done to the answer
NONE, SWIGLU, GELU = (tl.constexpr(i) for i in range(3))
# where it goes
STORE, ADD = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def read_input(x, norm_weight, columns, row_live, squares, K: tl.constexpr, BEFORE: tl.constexpr):
    """A tile of x [M, BK] in fp32 as the product takes it, and the sums of its squares added to `squares` [M]."""
    tile = tl.load(x, mask=row_live[:, None] & (columns < K)[None, :], other=0.0).to(tl.float32)
    if BEFORE >= RMS:
        squares += tl.sum(tile * tile, 1)
        tile *= tl.load(norm_weight + columns, mask=columns < K, other=0.0)[None, :].to(tl.float32)
    if BEFORE == SILU_OF:
        tile *= tl.sigmoid(tile)
    return tile, squares


@triton.jit
def normalized(y, squares, eps, K: tl.constexpr, BEFORE: tl.constexpr):
    if BEFORE == RMS:
        y *= tl.rsqrt(squares / K + eps)
    if BEFORE == RMS_EPS_OUTSIDE:
        y *= 1 / (tl.sqrt(squares / K) + eps)
    return y


@triton.jit
def scaled(y, scales, bias, columns, inside, INT8: tl.constexpr, BIAS: tl.constexpr):
    if INT8:
        y *= tl.load(scales + columns, mask=inside, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias + columns, mask=inside, other=0.0)[None, :].to(tl.float32)
    return y


@triton.jit
def read_past(
    taps, past, past_stride, slots, rows, columns, row_live, channels,
    CONV: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Where rows sit, what the short convolution of the first `channels` columns remembers of them [M, BN, STEPS], and
    its taps: all this may be read ahead of the wait. STEPS: a power of two, at least W - 1."""
    slot, before, weights, last = 0, 0.0, 0.0, 0.0
    if CONV:
        convolved = columns < channels
        steps = tl.arange(0, STEPS)
        kept = convolved[:, None] & (steps < W - 1)[None, :]
        weights = tl.load(taps + columns[:, None] * W + steps[None, :], mask=kept, other=0.0)
        last = tl.load(taps + columns * W + W - 1, mask=convolved, other=0.0)
        slot = tl.load(slots + rows, mask=row_live, other=0)
        at = slot[:, None, None] * past_stride + columns[None, :, None] * (W - 1) + steps[None, None, :]
        before = tl.load(past + at, mask=row_live[:, None, None] & kept[None, :, :], other=0.0)
    return slot, before, weights, last


@triton.jit
def convolve(
    y, slot, before, weights, last, past, past_stride, columns, live, channels,
    W: tl.constexpr, STEPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The short convolution of the first `channels` columns; their past moves on. The rest is left as it is."""
    convolved = (columns < channels)[None, :]
    sum = y * last[None, :].to(tl.float32) + tl.sum(before.to(tl.float32) * weights[None, :, :].to(tl.float32), 2)
    if W > 1:
        live = live & convolved
        steps = tl.arange(0, STEPS)
        at = past + slot[:, None] * past_stride + columns[None, :] * (W - 1)
        moved = live[:, :, None] & ((steps > 0) & (steps < W - 1))[None, None, :]
        # others may hold the same numbers, and must have read them
        tl.debug_barrier()
        tl.store(at[:, :, None] + steps[None, None, :] - 1, before, mask=moved)
        tl.store(at + W - 2, y.to(past.dtype.element_ty), mask=live)
    if SILU:
        sum *= tl.sigmoid(sum)
    return tl.where(convolved, sum, y)


@triton.jit
def activated(y, gate, ACT: tl.constexpr):
    """act(y); for SWIGLU silu(gate) y."""
    if ACT == SWIGLU:
        y = gate * tl.sigmoid(gate) * y
    if ACT == GELU:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * tl.sigmoid(2 * inner)
    return y


@triton.jit
def finish(
    y, gate, scales, bias, slot, before, weights, last, past, past_stride, out, out_stride, rows, columns, row_live,
    N, channels,
    ACT: tl.constexpr, TARGET: tl.constexpr, INT8: tl.constexpr, BIAS: tl.constexpr, CONV: tl.constexpr,
    W: tl.constexpr, STEPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    inside = columns < N
    live = row_live[:, None] & inside[None, :]
    at = out + rows[:, None] * out_stride + columns[None, :]
    if ACT == SWIGLU:
        gate = scaled(gate, scales, bias, columns, inside, INT8, BIAS)
        y = scaled(y, scales, bias, columns + N, inside, INT8, BIAS)
    else:
        y = scaled(y, scales, bias, columns, inside, INT8, BIAS)
    if CONV:
        y = convolve(y, slot, before, weights, last, past, past_stride, columns, live, channels, W, STEPS, SILU)
    y = activated(y, gate, ACT)
    if TARGET == ADD:
        y += tl.load(at, mask=live, other=0.0).to(tl.float32)
    tl.store(at, y.to(out.dtype.element_ty), mask=live)


@triton.jit
def vector_kernel(
    x, x_stride, w, scales, bias, norm_weight, eps, taps, past, past_stride, channels, slots, out,
    out_stride, num_rows, N, boundary, shift,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BEFORE: tl.constexpr, ACT: tl.constexpr,
    TARGET: tl.constexpr, INT8: tl.constexpr, BIAS: tl.constexpr, CONV: tl.constexpr, W: tl.constexpr,
    STEPS: tl.constexpr, SILU: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row and BN columns a program, K whole. Each thread reads the numbers of x that meet its numbers of W."""
    first = tl.program_id(0) * BN
    columns, k = first + tl.arange(0, BN), tl.arange(0, BK)
    x += tl.where(first >= boundary, shift, 0)
    squares = tl.zeros([BK], tl.float32)
    sums = tl.zeros([BN, BK], tl.float32)
    gates = sums
    w_at = w + columns[:, None].to(tl.int64) * K + k[None, :]
    again = columns[:, None] * 0 + k[None, :]
    rows = tl.arange(0, 1)
    row_live = rows < num_rows
    slot, before, weights, last = read_past(
        taps, past, past_stride, slots, rows, columns, row_live, channels, CONV, W, STEPS
    )  # fmt: skip
    for k0 in tl.static_range(0, K, BK):
        inside = (columns < N)[:, None] & (k0 + k < K)[None, :]
        tile = tl.load(w_at + k0, mask=inside, other=0)
        up = tile
        if ACT == SWIGLU:
            up = tl.load(w_at + k0 + N.to(tl.int64) * K, mask=inside, other=0)
        if k0 == 0:
            wait(OVERLAP)
        numbers = tl.load(x + k0 + again, mask=inside, other=0.0).to(tl.float32)
        if BEFORE >= RMS:
            row = tl.load(x + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
            squares += row * row
            numbers *= tl.load(norm_weight + k0 + again, mask=inside, other=0.0).to(tl.float32)
        if BEFORE == SILU_OF:
            numbers *= tl.sigmoid(numbers)
        if ACT == SWIGLU:
            gates += numbers * tile.to(tl.float32)
        sums += numbers * up.to(tl.float32)
    y = tl.sum(sums, 1)[None, :]
    gate = y
    if ACT == SWIGLU:
        gate = tl.sum(gates, 1)[None, :]
    if BEFORE >= RMS:
        total = tl.sum(squares, 0)
        y = normalized(y, total, eps, K, BEFORE)
        gate = normalized(gate, total, eps, K, BEFORE)
    finish(y, gate, scales, bias, slot, before, weights, last, past, past_stride, out, out_stride, rows, columns,
           row_live, N, channels, ACT, TARGET, INT8, BIAS, CONV, W, STEPS, SILU)  # fmt: skip


@triton.jit
def tile_kernel(
    x, x_stride, w, scales, bias, norm_weight, eps, taps, past, past_stride, channels, slots, out,
    out_stride, num_rows, N, boundary, shift,
    K: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BEFORE: tl.constexpr, ACT: tl.constexpr,
    TARGET: tl.constexpr, INT8: tl.constexpr, BIAS: tl.constexpr, CONV: tl.constexpr, W: tl.constexpr,
    STEPS: tl.constexpr, SILU: tl.constexpr, OVERLAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """M rows (at least 16) and BN columns a program, K whole."""
    first = tl.program_id(0) * BN
    rows, columns, k = tl.program_id(1) * M + tl.arange(0, M), first + tl.arange(0, BN), tl.arange(0, BK)
    row_live = rows < num_rows
    x += tl.where(first >= boundary, shift, 0)
    squares = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, BN], tl.float32)
    gates = sums
    w_at = w + columns[:, None].to(tl.int64) * K + k[None, :]
    x_at = x + rows[:, None] * x_stride + k[None, :]
    wait(OVERLAP)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        inside = (columns < N)[:, None] & (k0 + k < K)[None, :]
        tile = tl.load(w_at + k0, mask=inside, other=0).to(x.dtype.element_ty)
        x_tile, squares = read_input(x_at + k0, norm_weight, k0 + k, row_live, squares, K, BEFORE)
        x_tile = x_tile.to(x.dtype.element_ty)
        if ACT == SWIGLU:
            gates = tl.dot(x_tile, tl.trans(tile), gates, input_precision="ieee")
            up_at = w_at + k0 + N.to(tl.int64) * K
            tile = tl.load(up_at, mask=inside, other=0).to(x.dtype.element_ty)
        sums = tl.dot(x_tile, tl.trans(tile), sums, input_precision="ieee")
    sums = normalized(sums, squares[:, None], eps, K, BEFORE)
    gates = normalized(gates, squares[:, None], eps, K, BEFORE)
    slot, before, weights, last = read_past(
        taps, past, past_stride, slots, rows, columns, row_live, channels, CONV, W, STEPS
    )  # fmt: skip
    finish(sums, gates, scales, bias, slot, before, weights, last, past, past_stride, out, out_stride, rows, columns,
           row_live, N, channels, ACT, TARGET, INT8, BIAS, CONV, W, STEPS, SILU)  # fmt: skip


@triton.jit
def finish_kernel(
    product, product_stride, bias, taps, past, past_stride, channels, slots, out, out_stride, N,
    BN: tl.constexpr, ACT: tl.constexpr, TARGET: tl.constexpr, BIAS: tl.constexpr, CONV: tl.constexpr,
    W: tl.constexpr, STEPS: tl.constexpr, SILU: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BN columns of one row: what stands behind the product x W^T, which is given."""
    rows, columns = tl.program_id(1) + tl.arange(0, 1), tl.program_id(0) * BN + tl.arange(0, BN)
    row_live = rows >= 0
    slot, before, weights, last = read_past(
        taps, past, past_stride, slots, rows, columns, row_live, channels, CONV, W, STEPS
    )  # fmt: skip
    wait(OVERLAP)
    at = product + rows[:, None].to(tl.int64) * product_stride + columns[None, :]
    gate = tl.load(at, mask=(columns < N)[None, :], other=0.0).to(tl.float32)
    y = gate
    if ACT == SWIGLU:
        y = tl.load(at + N, mask=(columns < N)[None, :], other=0.0).to(tl.float32)
    finish(y, gate, None, bias, slot, before, weights, last, past, past_stride, out, out_stride, rows, columns,
           row_live, N, channels, ACT, TARGET, False, BIAS, CONV, W, STEPS, SILU)  # fmt: skip
