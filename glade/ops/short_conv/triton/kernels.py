"""The short convolution on a GPU: rows are tokens, a program takes a tile of them and one group of channels.

A group is a head where a norm divides it, so that its sum of squares is the program's own. With a_t the sum over taps,
z = silu(a) and r the inverse norm, y = r z:

    forward          reads x, writes y
    activations      reads x and dy, makes a again, writes da and the tile's part of the gradients of taps and bias
    inputs           reads da, writes dx_t = sum_lag w_lag da_{t + lag}

and two small kernels for the states at the borders of documents. A state stands before the first token, oldest first:
the input at distance `lag` before token t of a document is x_{t - lag}, or entry W - 1 + t - lag of the state where
t < lag. All arithmetic is fp32.
"""

# Triton is not installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl


@triton.jit
def row_documents(rows, num_rows, num_tokens, documents, borders, PACKED: tl.constexpr):
    """Of each row its document, and the first row and the end of that."""
    if PACKED:
        document = tl.load(documents + rows, mask=rows < num_rows, other=0)
        start, end = tl.load(borders + document), tl.load(borders + document + 1)
    else:
        document = rows // num_tokens
        start = document * num_tokens
        end = start + num_tokens
    return document, start, end


@triton.jit
def lagged(x, stride, state, first, rows, starts, document, num_rows, columns, inside, D, LAG: tl.constexpr,
           W: tl.constexpr, STATE: tl.constexpr):  # fmt: skip
    """[rows, columns]: the inputs `LAG` tokens before each row, in fp32, the state's where the document has none."""
    row = first + rows
    here = (row < num_rows) & (row - LAG >= starts)
    tile = x + first.to(tl.int64) * stride + columns[None, :]
    value = tl.load(tile + (rows - LAG)[:, None] * stride, mask=here[:, None] & inside[None, :], other=0.0)
    value = value.to(tl.float32)
    if STATE and LAG > 0:
        past = (row < num_rows) & (row - LAG < starts)
        at = document.to(tl.int64)[:, None] * D * (W - 1) + columns[None, :] * (W - 1)
        at += (W - 1 + row - LAG - starts)[:, None]
        value += tl.load(state + at, mask=past[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def tap_sums(x, stride, weight, bias, state, first, rows, starts, document, num_rows, columns, inside, D,
             W: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """[rows, columns]: bias + sum_lag w_lag x_{t - lag}."""
    a = tl.zeros([BT, BD], tl.float32)
    if BIAS:
        a += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    for lag in tl.static_range(0, W):
        tap = tl.load(weight + columns * W + (W - 1 - lag), mask=inside, other=0.0).to(tl.float32)
        a += tap[None, :] * lagged(
            x, stride, state, first, rows, starts, document, num_rows, columns, inside, D, lag, W, STATE
        )
    return a


@triton.jit
def inverse_norm(z, normed, eps, NORM: tl.constexpr, BT: tl.constexpr):
    """[rows]: 1 / sqrt(sum z^2 + eps), or 1 where the group is not divided."""
    inverse = tl.full([BT], 1.0, tl.float32)
    if NORM:
        inverse = tl.where(normed, tl.rsqrt(tl.sum(z * z, 1) + eps), inverse)
    return inverse


@triton.jit
def silu(a, SILU: tl.constexpr):
    z = a
    if SILU:
        z = a * tl.sigmoid(a)
    return z


@triton.jit
def forward_kernel(
    x, stride, weight, bias, state, y, documents, borders, num_rows, num_tokens, D, num_unit, eps,
    WIDTH: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, W: tl.constexpr,
    SILU: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    first, group = tl.program_id(0) * BT, tl.program_id(1)
    rows, channels = tl.arange(0, BT), tl.arange(0, BD)
    columns = group * WIDTH + channels
    inside = (channels < WIDTH) & (columns < D)
    document, starts, _ = row_documents(first + rows, num_rows, num_tokens, documents, borders, PACKED)
    a = tap_sums(x, stride, weight, bias, state, first, rows, starts, document, num_rows, columns, inside, D,
                 W, BIAS, STATE, BT, BD)  # fmt: skip
    z = silu(a, SILU)
    z *= inverse_norm(z, group * WIDTH < num_unit, eps, NORM, BT)[:, None]
    at = first.to(tl.int64) * D + rows[:, None] * D + columns[None, :]
    tl.store(y + at, z.to(y.dtype.element_ty), mask=(first + rows < num_rows)[:, None] & inside[None, :])


@triton.jit
def activations_backward_kernel(
    dy, dy_stride, x, stride, weight, bias, state, da, parts, documents, borders,
    num_rows, num_tokens, D, num_unit, eps,
    WIDTH: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, TILES: tl.constexpr,
    SILU: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    block, group = tl.program_id(0), tl.program_id(1)
    rows, channels, taps = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, WP)
    columns = group * WIDTH + channels
    inside = (channels < WIDTH) & (columns < D)
    normed = group * WIDTH < num_unit
    sums = tl.zeros([WP, BD], tl.float32)  # of the gradients of taps, in their order, then of the bias
    for tile in tl.range(0, TILES):
        first = (block * TILES + tile) * BT
        document, starts, _ = row_documents(first + rows, num_rows, num_tokens, documents, borders, PACKED)
        a = tap_sums(x, stride, weight, bias, state, first, rows, starts, document, num_rows, columns, inside, D,
                     W, BIAS, STATE, BT, BD)  # fmt: skip
        live = (first + rows < num_rows)[:, None] & inside[None, :]
        at_dy = dy + first.to(tl.int64) * dy_stride + rows[:, None] * dy_stride + columns[None, :]
        d = tl.load(at_dy, mask=live, other=0.0).to(tl.float32)
        if NORM:
            z = silu(a, SILU)
            inverse = inverse_norm(z, normed, eps, NORM, BT)[:, None]
            unit = z * inverse
            along = tl.where(normed, tl.sum(d * unit, 1), 0.0)
            d = inverse * (d - unit * along[:, None])
        if SILU:
            s = tl.sigmoid(a)
            d *= s * (1 + a * (1 - s))
        at = first.to(tl.int64) * D + rows[:, None] * D + columns[None, :]
        tl.store(da + at, d.to(da.dtype.element_ty), mask=live)
        for lag in tl.static_range(0, W):
            value = lagged(x, stride, state, first, rows, starts, document, num_rows, columns, inside, D, lag, W, STATE)
            sums += tl.where(taps[:, None] == W - 1 - lag, tl.sum(d * value, 0)[None, :], 0.0)
        if BIAS:
            sums += tl.where(taps[:, None] == W, tl.sum(d, 0)[None, :], 0.0)
    at = (block * (W + 1) + taps)[:, None] * D + columns[None, :]
    tl.store(parts + at, sums, mask=(taps <= W)[:, None] & inside[None, :])


@triton.jit
def inputs_backward_kernel(
    da, weight, dfinal, dx, documents, borders, num_rows, num_tokens, D,
    BD: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    first, group = tl.program_id(0) * BT, tl.program_id(1)
    rows, columns = tl.arange(0, BT), group * BD + tl.arange(0, BD)
    inside = columns < D
    row = first + rows
    document, _, ends = row_documents(row, num_rows, num_tokens, documents, borders, PACKED)
    live = row < num_rows
    tile = first.to(tl.int64) * D + columns[None, :]
    d = tl.zeros([BT, BD], tl.float32)
    for lag in tl.static_range(0, W):
        tap = tl.load(weight + columns * W + (W - 1 - lag), mask=inside, other=0.0).to(tl.float32)
        there = (live & (row + lag < ends))[:, None] & inside[None, :]
        d += tap[None, :] * tl.load(da + tile + (rows + lag)[:, None] * D, mask=there, other=0.0).to(tl.float32)
    if FINAL and W > 1:
        entry = W - 1 - (ends - row)
        at = document.to(tl.int64)[:, None] * D * (W - 1) + columns[None, :] * (W - 1) + entry[:, None]
        d += tl.load(dfinal + at, mask=(live & (entry >= 0))[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(dx + tile + rows[:, None] * D, d.to(dx.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def document_rows(document, num_tokens, borders, PACKED: tl.constexpr):
    if PACKED:
        start, end = tl.load(borders + document), tl.load(borders + document + 1)
    else:
        start, end = document * num_tokens, (document + 1) * num_tokens
    return start, end


@triton.jit
def final_state_kernel(
    x, stride, state, final, borders, num_tokens, D,
    BD: tl.constexpr, W: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    document, columns = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    start, end = document_rows(document, num_tokens, borders, PACKED)
    inside = columns < D
    at = document.to(tl.int64) * D * (W - 1) + columns * (W - 1)
    for entry in tl.static_range(0, W - 1):
        row = end - (W - 1) + entry
        value = tl.load(x + row.to(tl.int64) * stride + columns, mask=inside & (row >= start), other=0.0)
        value = value.to(tl.float32)
        if STATE:
            # of a document shorter than the state, the younger entries stay
            value += tl.load(state + at + (W - 1 + row - start), mask=inside & (row < start), other=0.0).to(tl.float32)
        tl.store(final + at + entry, value.to(final.dtype.element_ty), mask=inside)


@triton.jit
def state_backward_kernel(
    da, weight, dfinal, dstate, borders, num_tokens, D,
    BD: tl.constexpr, W: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    document, columns = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    start, end = document_rows(document, num_tokens, borders, PACKED)
    inside = columns < D
    at = document.to(tl.int64) * D * (W - 1) + columns * (W - 1)
    for entry in tl.static_range(0, W - 1):
        d = tl.zeros([BD], tl.float32)
        for token in tl.static_range(0, entry + 1):
            tap = tl.load(weight + columns * W + entry - token, mask=inside, other=0.0).to(tl.float32)
            there = inside & (start + token < end)
            d += tap * tl.load(da + (start + token).to(tl.int64) * D + columns, mask=there, other=0.0).to(tl.float32)
        if FINAL:
            kept = entry - (end - start)
            d += tl.load(dfinal + at + kept, mask=inside & (kept >= 0), other=0.0).to(tl.float32)
        tl.store(dstate + at + entry, d.to(dstate.dtype.element_ty), mask=inside)


@triton.jit
def step_kernel(
    x, stride, weight, bias, state, slot_stride, slots, y, D, num_unit, eps,
    WIDTH: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
    SILU: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = tl.arange(0, BD)
    columns = group * WIDTH + channels
    inside = (channels < WIDTH) & (columns < D)
    slot = row
    if SLOTS:
        slot = tl.load(slots + row)
    present = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    a = present * tl.load(weight + columns * W + (W - 1), mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        a += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    at = state + slot * slot_stride + columns * (W - 1)
    for entry in tl.static_range(0, W - 1):
        past = tl.load(at + entry, mask=inside, other=0.0)
        a += past.to(tl.float32) * tl.load(weight + columns * W + entry, mask=inside, other=0.0).to(tl.float32)
        if entry > 0:
            tl.store(at + entry - 1, past, mask=inside)
    if W > 1:
        tl.store(at + W - 2, present.to(state.dtype.element_ty), mask=inside)
    z = silu(a, SILU)
    if NORM:
        z *= tl.where(group * WIDTH < num_unit, tl.rsqrt(tl.sum(z * z, 0) + eps), 1.0)
    tl.store(y + row * D + columns, z.to(y.dtype.element_ty), mask=inside)
