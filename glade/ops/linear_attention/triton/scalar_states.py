"""Scalar gates, kernels 2 and 3: the pass over the chunks of a sequence, forwards and backwards, for a block of value
channels.

A scalar decay multiplies rows of products, so that q and k are read as they are and no gated copy of them is made. The
products of the chunk's pairs, P = scale D * q k^T, are made by the pass forwards, and read by the one backwards. With S
the state before a chunk, dS the gradient of the state after it, D_rc = exp(G_r - G_c) for r >= c and zero otherwise:

    R = A (write v - erase exp(G) (k S))                     S <- exp(G_C) S + k^T (exp(G_C - G) R)
    o = scale exp(G) (q S) + P R                             dR^ = A^T (P^T do + exp(G_C - G) (k dS))
    dS <- exp(G_C) dS + q^T (scale exp(G) do) - k^T (erase exp(G) dR^)
    dv = write dR^       d_write = v dR^

Without erase A is the identity, and neither R nor dR^ is kept. A gradient of a scalar `write` is written for every
sixteen value channels.

All is held as value channels by tokens or by key channels, the transpose of what stands above: S, z, R and their
gradients are then the left sides of their products, which `wgmma` takes from registers, and k, q and A the right ones,
as they lie in memory. R, dR^ and do do not depend on chunks; of S and dS only those at the borders of spans of chunks
are kept, for `scalar_keys`, and R and dR^ are laid out by spans, each in one piece.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from glade.ops.linear_attention.triton.tiles import (
    NONE,
    SCALAR,
    VECTOR,
    load_rows,
    load_tile,
    sequence_chunks,
    sequence_tokens,
    token_head,
)


@triton.jit
def kept_at(values, dims, VP: tl.constexpr, BK: tl.constexpr):
    """Where a state's elements are kept: blocks of the BK key channels that `scalar_keys` takes at a time, each of all
    value channels, so that it reads one piece of memory after the other."""
    return dims // BK * (BK * VP) + values * BK + dims % BK


@triton.jit
def kept_block_at(state, values, first, VP: tl.constexpr, BK: tl.constexpr):
    """`kept_at`, from a state's own place on, of the BK channels from `first`, a multiple of BK. Remainders would hide
    from Triton that they lie in one piece, and it would not copy them ahead."""
    return state + first * VP + values * BK + tl.arange(0, BK)[None, :]


@triton.jit
def written_at(span, chunk, rows, columns, VP: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr):
    """Where R and dR^ of a chunk of its sequence are kept, [values, tokens]: by spans, each in one piece."""
    return (span * SPAN + chunk % SPAN) * C * VP + columns[:, None] + rows[None, :] * VP


@triton.jit
def chunk_decays(G, tile, rows, C: tl.constexpr):
    """G [C], exp(G) [C], exp(G_C - G) [C] and exp(G_C), of a chunk's sums of logs."""
    sums = tl.load(G + tile * C + rows)
    last = tl.load(G + tile * C + C - 1)
    to_row, to_end = tl.exp2(sums.to(tl.float32)), tl.exp2((last - sums).to(tl.float32))
    return sums, to_row, to_end, tl.exp2(last.to(tl.float32))


@triton.jit
def values_to_write(
    v, v_strides, v_tiles, write, write_strides, write_rows, elsewhere, row, start, head, tile, live, first, V,
    C: tl.constexpr, BV: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """write v, [value channels, tokens] in fp32."""
    v_tile = load_tile(v, v_strides, v_tiles, row, start, head, live, first, V, C, BV)
    rows, columns = tl.arange(0, C), first + tl.arange(0, BV)
    # Never so: a second use, without which Triton lays v's copy in shared memory out as an operand, cannot write it in
    # 4 bytes, and keeps the copies ahead in registers, waiting for each as soon as it is asked for.
    if v_tiles is None and live <= 0:
        tl.store(elsewhere + columns[None, :] + rows[:, None], v_tile.to(elsewhere.dtype.element_ty))
    z = tl.trans(v_tile).to(tl.float32)
    if WRITE == SCALAR:
        z *= tl.load(write_rows + tile * C + rows)[None, :]
    elif WRITE == VECTOR:
        gate = token_head(write, write_strides, row, start, head)
        z *= tl.trans(load_rows(gate, write_strides, rows, live, columns, V)).to(tl.float32)
    return z


@triton.jit
def scalar_forward_states_kernel(
    q, k, v, write, q_strides, k_strides, v_strides, write_strides, q_tiles, k_tiles, v_tiles,
    G, erase_rows, write_rows, A,
    o, initial, final, R, S_before, P,
    starts, ends, num_tokens, firsts, chunks_a_row, chunks_a_sequence,
    span_firsts, spans_a_row, spans_a_sequence, scale,
    HV, GROUP, K, V,
    KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr,
    INITIAL: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = VP // BV
    sequence_head = tl.program_id(0) // NUM_BLOCKS
    block = tl.program_id(0) % NUM_BLOCKS
    n, head = sequence_head // HV, sequence_head % HV
    first, end_chunk = sequence_chunks(n, firsts, chunks_a_row, chunks_a_sequence)
    row, origin, end_token = sequence_tokens(first, end_chunk, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    first_span, _ = sequence_chunks(n, span_firsts, spans_a_row, spans_a_sequence)
    rows, dims, columns = tl.arange(0, C), tl.arange(0, KP), block * BV + tl.arange(0, BV)
    in_state = (columns < V)[:, None] & (dims < K)[None, :]
    not_before = rows[None, :] >= rows[:, None]
    square = rows[:, None] * C + rows[None, :]
    states = kept_at(columns[:, None], dims[None, :], VP, BK)
    token_values = columns[:, None] + rows[None, :] * (HV * V)
    state_at = columns[:, None] + dims[None, :] * V
    of_sequence = sequence_head.to(tl.int64) * K * V
    if INITIAL:
        S = tl.load(initial + of_sequence + state_at, mask=in_state, other=0.0)
    else:
        S = tl.zeros([BV, KP], tl.float32)
    for m in tl.range(first, end_chunk, num_stages=STAGES):
        m = tl.zeros([], tl.int32) + m  # a tensor, in Triton's interpreter too
        start = origin + m * C
        live = end_token - start
        tile = m.to(tl.int64) * HV + head
        q_tile = load_tile(q, q_strides, q_tiles, row, start, head // GROUP, live, 0, K, C, KP).to(DTYPE)
        k_tile = load_tile(k, k_strides, k_tiles, row, start, head // GROUP, live, 0, K, C, KP).to(DTYPE)
        # Made first, and rounded at once: later it would stand in registers beside all the other sums. Its rows are
        # the earlier tokens.
        products = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
        if GATE == SCALAR:
            sums, to_row, to_end, decay = chunk_decays(G, tile, rows, C)
            products *= tl.exp2(tl.minimum(sums[None, :] - sums[:, None], 0.0).to(tl.float32))
        products = tl.where(not_before, products, 0.0).to(DTYPE)

        z = values_to_write(
            v, v_strides, v_tiles, write, write_strides, write_rows, o, row, start, head, tile, live, block * BV, V,
            C, BV, WRITE,
        )  # fmt: skip
        S_low = S.to(DTYPE)
        out = tl.dot(S_low, tl.trans(q_tile), input_precision=PRECISION)
        if ERASE != NONE:
            erased = tl.load(erase_rows + tile * C + rows)
            if GATE == SCALAR:
                erased *= to_row
            z -= erased[None, :] * tl.dot(S_low, tl.trans(k_tile), input_precision=PRECISION)
            inverse = tl.load(A + tile * C * C + square)
            z = tl.dot(z.to(DTYPE), tl.trans(inverse), input_precision=PRECISION)
        if KEEP:
            span = (first_span + (m - first) // SPAN).to(tl.int64) * HV + head
            if (m - first) % SPAN == 0:
                tl.store(S_before + span * KP * VP + states, S_low)
            if block == 0:
                tl.store(P + tile * C * C + square, products)
        r = z.to(DTYPE)
        if GATE == SCALAR:
            out *= (to_row * scale)[None, :]
        else:
            out *= scale
        out = tl.dot(r, products, out, input_precision=PRECISION)
        at_end = r
        if GATE == SCALAR:
            at_end = (z * to_end[None, :]).to(DTYPE)
            S *= decay
        S = tl.dot(at_end, k_tile, S, input_precision=PRECISION)
        first_value = ((row.to(tl.int64) * num_tokens + start) * HV + head) * V
        inside = (columns < V)[:, None] & (rows < live)[None, :]
        tl.store(o + first_value + token_values, out.to(o.dtype.element_ty), mask=inside)
        if KEEP and ERASE != NONE:
            tl.store(R + written_at(span, m - first, rows, columns, VP, C, SPAN), r, mask=inside)
    if final is not None:
        tl.store(final + of_sequence + state_at, S, mask=in_state)


@triton.jit
def scalar_backward_states_kernel(
    do, q, k, v, write, q_strides, k_strides, v_strides, write_strides,
    G, erase_rows, write_rows, A, P,
    d_final, d_initial, dv, d_write, dR, dS_after,
    starts, ends, num_tokens, firsts, chunks_a_row, chunks_a_sequence,
    span_firsts, spans_a_row, spans_a_sequence, num_token_heads, scale,
    HV, GROUP, K, V, dv_stride,
    KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr, INITIAL: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = VP // BV
    sequence_head = tl.program_id(0) // NUM_BLOCKS
    block = tl.program_id(0) % NUM_BLOCKS
    n, head = sequence_head // HV, sequence_head % HV
    first, end_chunk = sequence_chunks(n, firsts, chunks_a_row, chunks_a_sequence)
    row, origin, end_token = sequence_tokens(first, end_chunk, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    first_span, _ = sequence_chunks(n, span_firsts, spans_a_row, spans_a_sequence)
    rows, dims, columns = tl.arange(0, C), tl.arange(0, KP), block * BV + tl.arange(0, BV)
    in_state = (columns < V)[:, None] & (dims < K)[None, :]
    square = rows[:, None] * C + rows[None, :]
    states = kept_at(columns[:, None], dims[None, :], VP, BK)
    token_values = columns[:, None] + rows[None, :] * (HV * V)
    state_at = columns[:, None] + dims[None, :] * V
    of_sequence = sequence_head.to(tl.int64) * K * V
    if d_final is None:
        dS = tl.zeros([BV, KP], tl.float32)
    else:
        dS = tl.load(d_final + of_sequence + state_at, mask=in_state, other=0.0)
    for step in tl.range(0, end_chunk - first, num_stages=STAGES):
        m = tl.zeros([], tl.int32) + (end_chunk - 1 - step)
        start = origin + m * C
        live = end_token - start
        tile = m.to(tl.int64) * HV + head
        q_head = token_head(q, q_strides, row, start, head // GROUP)
        k_head = token_head(k, k_strides, row, start, head // GROUP)
        q_tile = load_rows(q_head, q_strides, rows, live, dims, K).to(DTYPE)
        k_tile = load_rows(k_head, k_strides, rows, live, dims, K).to(DTYPE)
        first_token = row.to(tl.int64) * num_tokens + start
        first_head = first_token * HV + head
        inside = (columns < V)[:, None] & (rows < live)[None, :]
        at_out = do + first_head * V + columns[None, :] + rows[:, None] * (HV * V)
        d_out = tl.load(at_out, mask=(rows < live)[:, None] & (columns < V)[None, :], other=0.0).to(DTYPE)
        if GATE == SCALAR:
            _sums, to_row, to_end, decay = chunk_decays(G, tile, rows, C)

        if WRITE != NONE:
            v_tile = load_rows(token_head(v, v_strides, row, start, head), v_strides, rows, live, columns, V)
        if WRITE == VECTOR:
            gate = token_head(write, write_strides, row, start, head)
            gate_tile = load_rows(gate, write_strides, rows, live, columns, V)
        products = tl.load(P + tile * C * C + square)
        dS_low = dS.to(DTYPE)
        z = tl.dot(dS_low, tl.trans(k_tile), input_precision=PRECISION)
        if GATE == SCALAR:
            z *= to_end[None, :]
        d_out = tl.trans(d_out)
        z = tl.dot(d_out, tl.trans(products), z, input_precision=PRECISION)
        span = (first_span + (m - first) // SPAN).to(tl.int64) * HV + head
        if ((m - first) % SPAN == SPAN - 1) | (m == end_chunk - 1):
            tl.store(dS_after + span * KP * VP + states, dS_low)
        if ERASE != NONE:
            z = tl.dot(z.to(DTYPE), tl.load(A + tile * C * C + square), input_precision=PRECISION)
            tl.store(dR + written_at(span, m - first, rows, columns, VP, C, SPAN), z.to(DTYPE), mask=inside)

        d_out = d_out.to(tl.float32) * scale
        if GATE == SCALAR:
            d_out *= to_row[None, :]
            dS *= decay
        dS = tl.dot(d_out.to(DTYPE), q_tile, dS, input_precision=PRECISION)
        if ERASE != NONE:
            erased = tl.load(erase_rows + tile * C + rows)
            if GATE == SCALAR:
                erased *= to_row
            dS = tl.dot((z * -erased[None, :]).to(DTYPE), k_tile, dS, input_precision=PRECISION)

        if WRITE != NONE:
            d_gate = z * tl.trans(v_tile).to(tl.float32)
            if WRITE == SCALAR:
                # by sixteens, which a warp holds: nothing passes from warp to warp
                parts = tl.arange(0, BV // 16)[:, None]
                at = d_write + (block * (BV // 16) + parts).to(tl.int64) * num_token_heads + first_head
                of_parts = tl.sum(tl.reshape(d_gate, [BV // 16, 16, C]), 1)
                tl.store(at + rows[None, :] * HV, of_parts, mask=rows[None, :] < live)
                z *= tl.load(write_rows + tile * C + rows)[None, :]
            else:
                tl.store(d_write + first_head * V + token_values, d_gate.to(d_write.dtype.element_ty), mask=inside)
                z *= tl.trans(gate_tile).to(tl.float32)
        at_v = dv + first_token * dv_stride + head * V + columns[:, None] + rows[None, :] * dv_stride
        tl.store(at_v, z.to(dv.dtype.element_ty), mask=inside)
    if INITIAL:
        tl.store(d_initial + of_sequence + state_at, dS, mask=in_state)
