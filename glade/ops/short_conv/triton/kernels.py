"""The short convolution on a GPU. A program takes one group of channels of several segments of rows, side by side, and
walks down them: each step is a row of every segment, and the rows before it are in registers.

A group is a head where a norm divides it, so that its sum of squares is the program's own. With a_t the sum over taps,
z = silu(a) and r the inverse norm, y = r z:

    forward     reads x, writes y
    backward    reads x and dy, makes a again and its gradient da, writes dx_t = sum_lag w_lag da_{t + lag} as soon as
                the last of these is there, and the program's part of the gradients of taps and bias, which are summed
                in registers. The W - 1 rows after a segment are walked too, for what they give to its last rows

and two small kernels for the states at the borders of documents. A state stands before the first token, oldest first:
the input at distance `lag` before token t of a document is x_{t - lag}, or entry W - 1 + t - lag of the state where
t < lag. All arithmetic is fp32.

CROSSES says that a segment may hold the border of two documents; else its document is known before the walk.
"""

# Triton need not be installed where there is no GPU
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
def taps_of(weight, columns, inside, W: tl.constexpr):
    """Of each lag its tap, [1, columns]."""
    taps = ()
    for lag in tl.static_range(0, W):
        tap = tl.load(weight + columns * W + (W - 1 - lag), mask=inside, other=0.0)
        taps += (tap.to(tl.float32)[None, :],)
    return taps


@triton.jit
def stood(state, document, entry, columns, mask, D: tl.constexpr, W: tl.constexpr):
    """[rows, columns]: an entry of each row's state."""
    at = document.to(tl.int64)[:, None] * (D * (W - 1)) + columns[None, :] * (W - 1) + entry[:, None]
    return tl.load(state + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def inputs_before(tile, stride: tl.constexpr, state, row, start, document, num_rows, columns, inside,
                  D: tl.constexpr, W: tl.constexpr, STATE: tl.constexpr):  # fmt: skip
    """The inputs 1 ... W - 1 tokens before each row, and one more that is never read."""
    inputs = ()
    for lag in tl.static_range(1, W):
        live, here = row < num_rows, row - lag >= start
        value = tl.load(tile - lag * stride, mask=(live & here)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if STATE:
            past = (live & (row - lag < start))[:, None] & inside[None, :]
            value += stood(state, document, W - 1 + row - lag - start, columns, past, D, W)
        inputs += (value,)
    inputs += (tl.zeros(tile.shape, tl.float32),)
    return inputs


@triton.jit
def begun(inputs, state, first, document, columns, inside, D: tl.constexpr, W: tl.constexpr, STATE: tl.constexpr):
    """`inputs_before` where `first` rows begin a document."""
    entries = ()
    for lag in tl.static_range(1, W):
        past = tl.zeros(inputs[0].shape, tl.float32)
        if STATE:
            entry = tl.full(first.shape, W - 1 - lag, tl.int32)
            past = stood(state, document, entry, columns, first[:, None] & inside[None, :], D, W)
        entries += (tl.where(first[:, None], past, inputs[lag - 1]),)
    entries += (inputs[W - 1],)
    return entries


@triton.jit
def shifted(present, tiles, W: tl.constexpr):
    """One tile more in front, the last one gone."""
    moved = (present,)
    for lag in tl.static_range(0, W - 1):
        moved += (tiles[lag],)
    return moved


@triton.jit
def tap_sums(inputs, taps, shift, W: tl.constexpr):
    """[rows, columns]: bias + sum_lag w_lag x_{t - lag}."""
    a = shift + taps[0] * inputs[0]
    for lag in tl.static_range(1, W):
        a += taps[lag] * inputs[lag]
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
def short_conv_forward_kernel(
    x, stride: tl.constexpr, weight, bias, state, y, documents, borders, num_rows, num_tokens,
    D: tl.constexpr, num_unit, eps,
    WIDTH: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, W: tl.constexpr,
    SEGMENT: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, CROSSES: tl.constexpr,
):  # fmt: skip
    first, group = tl.program_id(0) * BS * SEGMENT, tl.program_id(1)
    segments, channels = tl.arange(0, BS) * SEGMENT, tl.arange(0, BD)
    columns = group * WIDTH + channels
    inside = (channels < WIDTH) & (columns < D)
    taps, shift = taps_of(weight, columns, inside, W), 0.0
    if BIAS:
        shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tile = x + first.to(tl.int64) * stride + segments[:, None] * stride + columns[None, :]
    out = y + first.to(tl.int64) * D + segments[:, None] * D + columns[None, :]
    document, start, _ = row_documents(first + segments, num_rows, num_tokens, documents, borders, PACKED)
    inputs = inputs_before(tile, stride, state, first + segments, start, document, num_rows, columns, inside,
                           D, W, STATE)  # fmt: skip
    for step in tl.range(0, SEGMENT, AHEAD):
        read = ()
        for ahead in tl.static_range(0, AHEAD):
            live = (first + segments + step + ahead < num_rows)[:, None] & inside[None, :]
            read += (tl.load(tile + (step + ahead) * stride, mask=live, other=0.0),)
        for ahead in tl.static_range(0, AHEAD):
            row = first + segments + step + ahead
            if CROSSES:
                document, start, _ = row_documents(row, num_rows, num_tokens, documents, borders, PACKED)
                begins = (row == start) & (row < num_rows)
                inputs = begun(inputs, state, begins, document, columns, inside, D, W, STATE)
            inputs = shifted(read[ahead].to(tl.float32), inputs, W)
            z = silu(tap_sums(inputs, taps, shift, W), SILU)
            z *= inverse_norm(z, group * WIDTH < num_unit, eps, NORM, BS)[:, None]
            live = (row < num_rows)[:, None] & inside[None, :]
            tl.store(out + (step + ahead) * D, z.to(y.dtype.element_ty), mask=live)


@triton.jit
def sums_backward(a, dy, normed, eps, SILU: tl.constexpr, NORM: tl.constexpr, BS: tl.constexpr):
    """[rows, columns]: da."""
    d = dy
    if NORM:
        z = silu(a, SILU)
        inverse = inverse_norm(z, normed, eps, NORM, BS)[:, None]
        unit = z * inverse
        along = tl.where(normed, tl.sum(d * unit, 1), 0.0)
        d = inverse * (d - unit * along[:, None])
    if SILU:
        s = tl.sigmoid(a)
        d *= s * (1 + a * (1 - s))
    return d


@triton.jit
def given_back(dinputs, da, taps, since, W: tl.constexpr, CROSSES: tl.constexpr):
    """The gradients of the inputs 0 ... W - 1 tokens before each row, those of this row's da among them."""
    grown = (taps[0] * da,)
    for lag in tl.static_range(1, W):
        more = taps[lag] * da
        if CROSSES:
            more = tl.where((since >= lag)[:, None], more, 0.0)
        grown += (dinputs[lag - 1] + more,)
    return grown


@triton.jit
def short_conv_backward_kernel(
    dy, dy_stride: tl.constexpr, x, stride: tl.constexpr, weight, bias, state, dfinal, dx, dx_stride: tl.constexpr,
    heads, parts, documents, borders, num_rows, num_tokens, D: tl.constexpr, num_unit, eps,
    WIDTH: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, W: tl.constexpr,
    SEGMENT: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr, CROSSES: tl.constexpr,
):  # fmt: skip
    """`heads` [documents, W - 1, D] takes da of each document's first rows, which its state has a share in."""
    first, group = tl.program_id(0) * BS * SEGMENT, tl.program_id(1)
    segments, channels = tl.arange(0, BS) * SEGMENT, tl.arange(0, BD)
    columns = group * WIDTH + channels
    inside = (channels < WIDTH) & (columns < D)
    normed = group * WIDTH < num_unit
    taps, shift = taps_of(weight, columns, inside, W), 0.0
    if BIAS:
        shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tile = x + first.to(tl.int64) * stride + segments[:, None] * stride + columns[None, :]
    tile_dy = dy + first.to(tl.int64) * dy_stride + segments[:, None] * dy_stride + columns[None, :]
    out = dx + first.to(tl.int64) * dx_stride + segments[:, None] * dx_stride + columns[None, :]
    document, start, _ = row_documents(first + segments, num_rows, num_tokens, documents, borders, PACKED)
    inputs = inputs_before(tile, stride, state, first + segments, start, document, num_rows, columns, inside,
                           D, W, STATE)  # fmt: skip
    dinputs, of_taps, of_bias = (), (), tl.zeros([BS, BD], tl.float32)
    for _lag in tl.static_range(0, W):
        dinputs += (tl.zeros([BS, BD], tl.float32),)
        of_taps += (tl.zeros([BS, BD], tl.float32),)
    _, _, end = row_documents(first + segments + SEGMENT - 1, num_rows, num_tokens, documents, borders, PACKED)
    for step in tl.range(0, (SEGMENT + W - 1 + AHEAD - 1) // AHEAD * AHEAD, AHEAD):
        read, read_dy = (), ()
        for ahead in tl.static_range(0, AHEAD):
            row, own = first + segments + step + ahead, step + ahead < SEGMENT
            live = ((row < num_rows) & (own | (row < end)))[:, None] & inside[None, :]
            read += (tl.load(tile + (step + ahead) * stride, mask=live, other=0.0),)
            read_dy += (tl.load(tile_dy + (step + ahead) * dy_stride, mask=live, other=0.0),)
        for ahead in tl.static_range(0, AHEAD):
            row, own = first + segments + step + ahead, step + ahead < SEGMENT
            if CROSSES:
                document, start, _ = row_documents(row, num_rows, num_tokens, documents, borders, PACKED)
                begins = (row == start) & (row < num_rows)
                inputs = begun(inputs, state, begins, document, columns, inside, D, W, STATE)
            inputs = shifted(read[ahead].to(tl.float32), inputs, W)
            a = tap_sums(inputs, taps, shift, W)
            da = sums_backward(a, read_dy[ahead].to(tl.float32), normed, eps, SILU, NORM, BS)
            of_own = tl.where(own, da, 0.0)
            grown = ()
            for lag in tl.static_range(0, W):
                grown += (of_taps[lag] + of_own * inputs[lag],)
            of_taps = grown
            if BIAS:
                of_bias += of_own
            if STATE and W > 1:
                head = (own & (row < num_rows) & (row - start < W - 1))[:, None] & inside[None, :]
                at = document.to(tl.int64) * (W - 1) + row - start
                tl.store(heads + at[:, None] * D + columns[None, :], da, mask=head)
            dinputs = given_back(dinputs, da, taps, row - start, W, CROSSES)
            d, row, done = dinputs[W - 1], row - (W - 1), step + ahead - (W - 1)
            live = ((row < num_rows) & (done >= 0) & (done < SEGMENT))[:, None] & inside[None, :]
            if FINAL and W > 1:
                ended, _, ends = row_documents(tl.maximum(row, 0), num_rows, num_tokens, documents, borders, PACKED)
                entry = W - 1 - (ends - row)
                d += stood(dfinal, ended, entry, columns, live & (entry >= 0)[:, None], D, W)
            tl.store(out + done * dx_stride, d.to(dx.dtype.element_ty), mask=live)
    at = parts + tl.program_id(0).to(tl.int64) * ((W + BIAS) * D)
    for lag in tl.static_range(0, W):
        tl.store(at + columns * W + (W - 1 - lag), tl.sum(of_taps[lag], 0), mask=inside)
    if BIAS:
        tl.store(at + W * D + columns, tl.sum(of_bias, 0), mask=inside)


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
    heads, weight, dfinal, dstate, borders, num_tokens, D,
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
            d += tap * tl.load(heads + (document.to(tl.int64) * (W - 1) + token) * D + columns, mask=there, other=0.0)
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
