"""Kernels 2 and 3: the pass over the chunks of a sequence, forwards and backwards, for a block of value channels.

They are copies and products of what kernel 1 prepared (`prepare.py`); the state stays in registers, in fp32. With S the
state before a chunk, dS the gradient of the state after it:

    R = A (Z - Eg S)            o = Qg S + P R             S <- exp(G_C) S + Kt^T R
    dR^ = A^T (P^T do + Kt dS)                             dS <- exp(G_C) dS + Qg^T do - Eg^T dR^

R and dR^ lie as v does, and do not depend on chunks; of S and dS only those at the borders of spans of chunks are kept,
for the kernel of keys. Where nothing is erased and `write` is none, R is v and dR^ is dv: R is not kept, and dR^ is
written to where dv lies.

The gradient of g takes rowsum(S dS) from S as it is kept (`vector_keys.py`). What a given state has beyond that is
summed here: in a short sequence it is all there is to the gradient of g.
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
    sequence_chunks,
    sequence_tokens,
    token_head,
)


@triton.jit
def decayed(S, decay, tile, dims, KP: tl.constexpr, GATE: tl.constexpr):
    if GATE == VECTOR:
        S *= tl.load(decay + tile * KP + dims)[:, None]
    elif GATE == SCALAR:
        S *= tl.load(decay + tile)
    return S


@triton.jit
def values_to_write(
    v, v_strides, write, write_strides, write_rows, row, start, head, tile, rows, live, columns, V,
    C: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """write v, [tokens, value channels] in fp32."""
    z = load_rows(token_head(v, v_strides, row, start, head), v_strides, rows, live, columns, V).to(tl.float32)
    if WRITE == SCALAR:
        z *= tl.load(write_rows + tile * C + rows)[:, None]
    elif WRITE == VECTOR:
        gate = token_head(write, write_strides, row, start, head)
        z *= load_rows(gate, write_strides, rows, live, columns, V).to(tl.float32)
    return z


@triton.jit
def forward_states_kernel(
    v, write, v_strides, write_strides, write_rows,
    Qg, Eg, Kt, decay, P, A,
    o, initial, final, R, S_before,
    starts, ends, num_tokens, firsts, chunks_a_row, chunks_a_sequence,
    span_firsts, spans_a_row, spans_a_sequence,
    HV, K, V,
    KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
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
    in_state = (dims < K)[:, None] & (columns < V)[None, :]
    wide = rows[:, None] * KP + dims[None, :]
    tall = rows[None, :] * KP + dims[:, None]
    square = rows[:, None] * C + rows[None, :]
    states = dims[:, None] * VP + columns[None, :]
    token_values = rows[:, None] * (HV * V) + columns[None, :]
    state_at = dims[:, None] * V + columns[None, :]
    of_sequence = sequence_head.to(tl.int64) * K * V
    if INITIAL:
        S = tl.load(initial + of_sequence + state_at, mask=in_state, other=0.0)
    else:
        S = tl.zeros([KP, BV], tl.float32)
    for m in tl.range(first, end_chunk, num_stages=STAGES):
        m = tl.zeros([], tl.int32) + m  # a tensor, in Triton's interpreter too
        start = origin + m * C
        live = end_token - start
        tile = m.to(tl.int64) * HV + head

        z = values_to_write(
            v, v_strides, write, write_strides, write_rows, row, start, head, tile, rows, live, columns, V, C, WRITE
        )
        S_low = S.to(DTYPE)
        if KEEP:
            span = (first_span + (m - first) // SPAN).to(tl.int64) * HV + head
            if (m - first) % SPAN == 0:
                tl.store(S_before + span * KP * VP + states, S_low)
        if ERASE != NONE:
            z -= tl.dot(tl.load(Eg + tile * C * KP + wide), S_low, input_precision=PRECISION)
            z = tl.dot(tl.load(A + tile * C * C + square), z.to(DTYPE), input_precision=PRECISION)
        r = z.to(DTYPE)
        out = tl.dot(tl.load(Qg + tile * C * KP + wide), S_low, input_precision=PRECISION)
        out = tl.dot(tl.load(P + tile * C * C + square), r, out, input_precision=PRECISION)
        first_value = ((row.to(tl.int64) * num_tokens + start) * HV + head) * V
        inside = (rows < live)[:, None] & (columns < V)[None, :]
        tl.store(o + first_value + token_values, out.to(o.dtype.element_ty), mask=inside)
        if KEEP and (ERASE != NONE or WRITE != NONE):
            tl.store(R + first_value + token_values, r, mask=inside)
        S = decayed(S, decay, tile, dims, KP, GATE)
        S = tl.dot(tl.load(Kt + tile * C * KP + tall), r, S, input_precision=PRECISION)
    if final is not None:
        tl.store(final + of_sequence + state_at, S, mask=in_state)


@triton.jit
def backward_states_kernel(
    do, Qg, Eg, Kt, decay, P, A, initial,
    d_final, d_initial, dR, dS_after, carried,
    starts, ends, num_tokens, firsts, chunks_a_row, chunks_a_sequence,
    span_firsts, spans_a_row, spans_a_sequence,
    HV, K, V, dR_stride,
    KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, INITIAL: tl.constexpr, PACKED: tl.constexpr,
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
    in_state = (dims < K)[:, None] & (columns < V)[None, :]
    wide = rows[:, None] * KP + dims[None, :]
    tall = rows[None, :] * KP + dims[:, None]
    transposed = rows[None, :] * C + rows[:, None]
    states = dims[:, None] * VP + columns[None, :]
    token_values = rows[:, None] * (HV * V) + columns[None, :]
    state_at = dims[:, None] * V + columns[None, :]
    of_sequence = sequence_head.to(tl.int64) * K * V
    if d_final is None:
        dS = tl.zeros([KP, BV], tl.float32)
    else:
        dS = tl.load(d_final + of_sequence + state_at, mask=in_state, other=0.0)
    for step in tl.range(0, end_chunk - first, num_stages=STAGES):
        m = tl.zeros([], tl.int32) + (end_chunk - 1 - step)
        start = origin + m * C
        live = end_token - start
        tile = m.to(tl.int64) * HV + head

        first_token = row.to(tl.int64) * num_tokens + start
        inside = (rows < live)[:, None] & (columns < V)[None, :]
        d_out = tl.load(do + (first_token * HV + head) * V + token_values, mask=inside, other=0.0).to(DTYPE)
        dS_low = dS.to(DTYPE)
        span = (first_span + (m - first) // SPAN).to(tl.int64) * HV + head
        if ((m - first) % SPAN == SPAN - 1) | (m == end_chunk - 1):
            tl.store(dS_after + span * KP * VP + states, dS_low)
        r = tl.dot(tl.load(P + tile * C * C + transposed), d_out, input_precision=PRECISION)
        r = tl.dot(tl.load(Kt + tile * C * KP + wide), dS_low, r, input_precision=PRECISION)
        if ERASE != NONE:
            r = tl.dot(tl.load(A + tile * C * C + transposed), r.to(DTYPE), input_precision=PRECISION)
        at = dR + first_token * dR_stride + head * V + rows[:, None] * dR_stride + columns[None, :]
        tl.store(at, r.to(dR.dtype.element_ty), mask=inside)
        dS = decayed(dS, decay, tile, dims, KP, GATE)
        dS = tl.dot(tl.load(Qg + tile * C * KP + tall), d_out, dS, input_precision=PRECISION)
        if ERASE != NONE:
            dS = tl.dot(tl.load(Eg + tile * C * KP + tall), (-r).to(DTYPE), dS, input_precision=PRECISION)
    if INITIAL:
        tl.store(d_initial + of_sequence + state_at, dS, mask=in_state)
        if GATE != NONE and end_chunk > first:
            span = (tl.zeros([], tl.int64) + first_span) * HV + head
            exact = tl.load(initial + of_sequence + state_at, mask=in_state, other=0.0)
            rounded_off = exact - exact.to(DTYPE).to(tl.float32)
            correction = tl.sum(rounded_off * tl.load(dS_after + span * KP * VP + states).to(tl.float32), 1)
            tl.store(carried + (span * NUM_BLOCKS + block) * KP + dims, correction)
