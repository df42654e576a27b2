"""The short convolution on a GPU. A program takes one group of channels of several segments of rows, side by side, and
walks down them: each step is a row of every segment, and the rows before it are in registers, as are those of the next
AHEAD steps, which are asked for before they are needed. A segment lies within one document.

A group is a head where a norm divides it, so that its sum of squares is the program's own; the groups of the first
NORMED channels are divided. With a_t the sum over taps, z = silu(a) and r the inverse norm, y = r z:

    forward     reads x, writes y
    backward    reads x and dy, makes a again and its gradient da, writes dx_t = sum_lag w_lag da_{t + lag} as soon as
                the last of these is there, and the program's part of the gradients of taps and bias, which are summed
                in registers. The W - 1 rows after a segment are walked too, for what they give to its last rows

and two small kernels for the states at the borders of documents. A state stands before the first token, oldest first:
the input at distance `lag` before token t of a document is x_{t - lag}, or entry W - 1 + t - lag of the state where
t < lag. All arithmetic is fp32.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl


@triton.jit
def columns_of(group, D: tl.constexpr, WIDTH: tl.constexpr, BD: tl.constexpr):
    """A group's columns, and which of them are its own and not only there to fill up a power of two."""
    channels = tl.arange(0, BD)
    columns = group * WIDTH + channels
    inside = channels < BD  # all: known when this is compiled
    if WIDTH < BD or D % WIDTH > 0:
        inside = (channels < WIDTH) & (columns < D)
    return columns, inside


@triton.jit
def segments_of(program, num_rows, num_tokens, firsts, documents, borders, BS: tl.constexpr, SEGMENT: tl.constexpr,
                PACKED: tl.constexpr):  # fmt: skip
    """Of each segment of a program its first row, its document, and the first row and the end of that. A segment that
    is there only to fill up the grid begins where its document ends."""
    segment = program * BS + tl.arange(0, BS)
    if PACKED:
        first, document = tl.load(firsts + segment), tl.load(documents + segment)
        start, end = tl.load(borders + document), tl.load(borders + document + 1)
    else:
        each = tl.cdiv(num_tokens, SEGMENT)
        document = segment // each
        start = document * num_tokens
        first, end = start + segment % each * SEGMENT, tl.minimum(start + num_tokens, num_rows)
    return first, document, start, end


@triton.jit
def taps_of(weight, bias, columns, inside, W: tl.constexpr, BIAS: tl.constexpr):
    """Of each lag its tap, and the bias: [1, columns] each, 0.0 where there is none."""
    taps, shift = (), 0.0
    for lag in tl.static_range(0, W):
        tap = tl.load(weight + columns * W + (W - 1 - lag), mask=inside, other=0.0)
        taps += (tap.to(tl.float32)[None, :],)
    if BIAS:
        shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return taps, shift


@triton.jit
def stood(state, document, entry, columns, mask, D: tl.constexpr, W: tl.constexpr):
    """[rows, columns]: an entry of each row's state."""
    at = document.to(tl.int64)[:, None] * (D * (W - 1)) + columns[None, :] * (W - 1) + entry[:, None]
    return tl.load(state + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def inputs_before(tile, stride: tl.constexpr, state, row, document, start, end, columns, inside,
                  D: tl.constexpr, W: tl.constexpr, STATE: tl.constexpr):  # fmt: skip
    """The inputs 1 ... W - 1 tokens before each row, and one more that is never read."""
    inputs = ()
    for lag in tl.static_range(1, W):
        live, here = row < end, row - lag >= start
        value = tl.load(tile - lag * stride, mask=(live & here)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if STATE:
            past = (live & (row - lag < start))[:, None] & inside[None, :]
            value += stood(state, document, W - 1 + row - lag - start, columns, past, D, W)
        inputs += (value,)
    inputs += (tl.zeros(tile.shape, tl.float32),)
    return inputs


@triton.jit
def shifted(present, tiles, NUM: tl.constexpr):
    """One of NUM tiles more in front, the last one gone."""
    moved = (present,)
    for i in tl.static_range(0, NUM - 1):
        moved += (tiles[i],)
    return moved


@triton.jit
def tap_sums(inputs, taps, shift, W: tl.constexpr):
    """[rows, columns]: bias + sum_lag w_lag x_{t - lag}."""
    a = shift + taps[0] * inputs[0]
    for lag in tl.static_range(1, W):
        a += taps[lag] * inputs[lag]
    return a


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)), by a root since a division takes many more instructions."""
    t = 1 + tl.exp2(a * -1.4426950408889634)
    return tl.rsqrt(t * t)


@triton.jit
def silu(a, SILU: tl.constexpr):
    z = a
    if SILU:
        z = a * sigmoid(a)
    return z


@triton.jit
def rows_of(tile, stride: tl.constexpr, row, end, inside, NUM: tl.constexpr):
    """NUM rows of each segment, as they lie in memory, and zeros from `end` on."""
    rows = ()
    for i in tl.static_range(0, NUM):
        rows += (tl.load(tile + i * stride, mask=(row + i < end)[:, None] & inside[None, :], other=0.0),)
    return rows


@triton.jit
def rows_walked(first, last, SEGMENT: tl.constexpr, WHOLE: tl.constexpr):
    """The most rows of a segment."""
    walked = SEGMENT
    if not WHOLE:
        walked = tl.max(last - first, 0)
    return walked


@triton.jit
def short_conv_forward_kernel(
    x, stride: tl.constexpr, weight, bias, state, y, firsts, documents, borders, num_rows, num_tokens,
    D: tl.constexpr, NORMED: tl.constexpr, eps,
    WIDTH: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, W: tl.constexpr,
    SEGMENT: tl.constexpr, WHOLE: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    program, group = tl.program_id(0) // tl.cdiv(D, WIDTH), tl.program_id(0) % tl.cdiv(D, WIDTH)
    columns, inside = columns_of(group, D, WIDTH, BD)
    # the two walks in turn, each known to be with a norm or without
    for normed in tl.static_range(NORMED >= D, 1 + (NORMED > 0)):
        if (group * WIDTH < NORMED) == normed:
            taps, shift = taps_of(weight, bias, columns, inside, W, BIAS)
            first, document, start, end = segments_of(program, num_rows, num_tokens, firsts, documents, borders,
                                                      BS, SEGMENT, PACKED)  # fmt: skip
            last = tl.minimum(first + SEGMENT, end)
            tile = x + first.to(tl.int64)[:, None] * stride + columns[None, :]
            out = y + first.to(tl.int64)[:, None] * D + columns[None, :]
            inputs = inputs_before(tile, stride, state, first, document, start, end, columns, inside, D, W, STATE)
            coming = rows_of(tile, stride, first, last, inside, AHEAD)
            for step in tl.range(0, rows_walked(first, last, SEGMENT, WHOLE), AHEAD):
                near, near_out, read = tile + step * stride, out + step * D, coming
                coming = rows_of(near + AHEAD * stride, stride, first + step + AHEAD, last, inside, AHEAD)
                for i in tl.static_range(0, AHEAD):
                    row, inputs = first + step + i, shifted(read[i].to(tl.float32), inputs, W)
                    z = silu(tap_sums(inputs, taps, shift, W), SILU)
                    if normed:
                        z *= tl.rsqrt(tl.sum(z * z, 1) + eps)[:, None]
                    live = (row < last)[:, None] & inside[None, :]
                    tl.store(near_out + i * D, z.to(y.dtype.element_ty), mask=live)


@triton.jit
def sums_backward(a, dy, eps, SILU: tl.constexpr, NORM: tl.constexpr):
    """[rows, columns]: da."""
    z, s, d = a, 1.0, dy
    if SILU:
        s = sigmoid(a)
        z = a * s
    if NORM:
        # both sums at once, neither waits for the other
        inverse, along = tl.rsqrt(tl.sum(z * z, 1) + eps), tl.sum(dy * z, 1)
        d = inverse[:, None] * (dy - (along * inverse * inverse)[:, None] * z)
    if SILU:
        d *= s + z * (1 - s)
    return d


@triton.jit
def with_products(sums, d, tiles, NUM: tl.constexpr):
    """Of NUM sums each with d times its tile added."""
    grown = ()
    for i in tl.static_range(0, NUM):
        grown += (sums[i] + d * tiles[i],)
    return grown


@triton.jit
def short_conv_backward_kernel(
    dy, dy_stride: tl.constexpr, x, stride: tl.constexpr, weight, bias, state, dfinal, dx, dx_stride: tl.constexpr,
    heads, parts, firsts, documents, borders, num_rows, num_tokens, D: tl.constexpr, NORMED: tl.constexpr, eps,
    WIDTH: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, W: tl.constexpr,
    SEGMENT: tl.constexpr, WHOLE: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`heads` [documents, W - 1, D] takes da of each document's first rows, which its state has a share in."""
    program, group = tl.program_id(0) // tl.cdiv(D, WIDTH), tl.program_id(0) % tl.cdiv(D, WIDTH)
    columns, inside = columns_of(group, D, WIDTH, BD)
    # the two walks in turn, each known to be with a norm or without
    for normed in tl.static_range(NORMED >= D, 1 + (NORMED > 0)):
        if (group * WIDTH < NORMED) == normed:
            taps, shift = taps_of(weight, bias, columns, inside, W, BIAS)
            first, document, start, end = segments_of(program, num_rows, num_tokens, firsts, documents, borders,
                                                      BS, SEGMENT, PACKED)  # fmt: skip
            last, behind = tl.minimum(first + SEGMENT, end), tl.minimum(first + SEGMENT + W - 1, end)
            tile = x + first.to(tl.int64)[:, None] * stride + columns[None, :]
            tile_dy = dy + first.to(tl.int64)[:, None] * dy_stride + columns[None, :]
            out = dx + (first.to(tl.int64) - (W - 1))[:, None] * dx_stride + columns[None, :]
            inputs = inputs_before(tile, stride, state, first, document, start, end, columns, inside, D, W, STATE)
            # gradients of the inputs 0 ... W - 1 tokens before each row, of the taps, and of the bias
            dinputs, of_taps, of_bias = (), (), tl.zeros([BS, BD], tl.float32)
            for _lag in tl.static_range(0, W):
                dinputs += (tl.zeros([BS, BD], tl.float32),)
                of_taps += (tl.zeros([BS, BD], tl.float32),)
            read = rows_of(tile, stride, first, behind, inside, AHEAD)
            read_dy = rows_of(tile_dy, dy_stride, first, behind, inside, AHEAD)
            walked = tl.cdiv(rows_walked(first, last, SEGMENT, WHOLE), AHEAD) * AHEAD
            # first the segments' own rows, then those behind them
            for own in tl.static_range(1, -1, -1):
                for step in tl.range(0 if own else walked, walked if own else walked + W - 1, AHEAD):
                    near, near_dy, near_out = tile + step * stride, tile_dy + step * dy_stride, out + step * dx_stride
                    for i in tl.static_range(0, AHEAD if own or W > AHEAD else W - 1):
                        row, inputs = first + step + i, shifted(read[0].to(tl.float32), inputs, W)
                        d, ahead = read_dy[0].to(tl.float32), i + AHEAD
                        # one by one: as many at once as in the forward walk would take more registers
                        read = read[1:] + rows_of(near + ahead * stride, stride, row + AHEAD, behind, inside, 1)
                        read_dy = read_dy[1:] + rows_of(near_dy + ahead * dy_stride, dy_stride, row + AHEAD, behind,
                                                        inside, 1)  # fmt: skip
                        da = sums_backward(tap_sums(inputs, taps, shift, W), d, eps, SILU, normed)
                        if own:
                            of_taps = with_products(of_taps, da, inputs, W)
                            if BIAS:
                                of_bias += da
                            if STATE and W > 1:
                                head = ((row < last) & (row - start < W - 1))[:, None] & inside[None, :]
                                entry = document.to(tl.int64) * (W - 1) + row - start
                                tl.store(heads + entry[:, None] * D + columns[None, :], da, mask=head)
                        dinputs = with_products(shifted(0.0, dinputs, W), da, taps, W)
                        d, done = dinputs[W - 1], row - (W - 1)
                        live = ((done >= first) & (done < last))[:, None] & inside[None, :]
                        if FINAL and W > 1:
                            entry = W - 1 - (end - done)
                            d += stood(dfinal, document, entry, columns, live & (entry >= 0)[:, None], D, W)
                        tl.store(near_out + i * dx_stride, d.to(dx.dtype.element_ty), mask=live)
            part = parts + program.to(tl.int64) * ((W + BIAS) * D)
            for lag in tl.static_range(0, W):
                tl.store(part + columns * W + (W - 1 - lag), tl.sum(of_taps[lag], 0), mask=inside)
            if BIAS:
                tl.store(part + W * D + columns, tl.sum(of_bias, 0), mask=inside)


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
