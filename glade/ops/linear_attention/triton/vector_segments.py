"""One long sequence: what each of its segments does to a state, all segments at once (`segments.py`).

N is the state after the segment where the one before it is zero. M is what the same steps make of the unit matrix
where nothing is written,

    M = product over chunks of (exp(G_C) - Kt^T A Eg),

so that its columns follow those of N as further value channels whose v is zero; without erase it is the diagonal
exp of the segment's sums of logs. dN is the gradient of the state before the segment where that of the one after it is
zero. All is held as in `states.py`.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from glade.ops.linear_attention.triton.states import decayed, values_to_write
from glade.ops.linear_attention.triton.tiles import (
    NONE,
    sequence_chunks,
    sequence_tokens,
    used_in_its_trip,
)


@triton.jit
def forward_segments_kernel(
    v, write, v_strides, write_strides, write_rows,
    Eg, Kt, decay, A,
    M, N,
    starts, ends, num_tokens, firsts, chunks_a_row, chunks_a_sequence,
    HV, V,
    KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, NUM_BLOCKS: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    segment_head = tl.program_id(0) // NUM_BLOCKS
    block = tl.program_id(0) % NUM_BLOCKS
    n, head = segment_head // HV, segment_head % HV
    first, end_chunk = sequence_chunks(n, firsts, chunks_a_row, chunks_a_sequence)
    row, origin, end_token = sequence_tokens(first, end_chunk, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    rows, dims, columns = tl.arange(0, C), tl.arange(0, KP), block * BV + tl.arange(0, BV)
    wide = rows[:, None] * KP + dims[None, :]
    tall = rows[None, :] * KP + dims[:, None]
    square = rows[:, None] * C + rows[None, :]
    of_segment = segment_head.to(tl.int64)
    # behind the value channels the columns of the unit matrix
    S = tl.where(columns[None, :] - VP == dims[:, None], 1.0, 0.0)
    kept = tl.full([KP, 1], 1.0, tl.float32)
    for m in tl.range(first, end_chunk, num_stages=STAGES):
        m = tl.zeros([], tl.int32) + m  # a tensor, in Triton's interpreter too
        start = origin + m * C
        live = end_token - start
        tile = m.to(tl.int64) * HV + head
        z = values_to_write(
            v, v_strides, write, write_strides, write_rows, row, start, head, tile, rows, live, columns, V, C, WRITE
        )
        if ERASE != NONE:
            z -= tl.dot(tl.load(Eg + tile * C * KP + wide), S.to(DTYPE), input_precision=PRECISION)
            z = tl.dot(tl.load(A + tile * C * C + square), z.to(DTYPE), input_precision=PRECISION)
        else:
            kept = decayed(kept, decay, tile, dims, KP, GATE)
        S = used_in_its_trip(decayed(S, decay, tile, dims, KP, GATE), live, GATE, ERASE)
        S = tl.dot(tl.load(Kt + tile * C * KP + tall), z.to(DTYPE), S, input_precision=PRECISION)
    states = columns[None, :] * KP + dims[:, None]
    tl.store(N + of_segment * VP * KP + states, S, mask=(columns < VP)[None, :])
    if ERASE != NONE:
        of_keys = (columns >= VP) & (columns < VP + KP)
        tl.store(M + of_segment * KP * KP + states - VP * KP, S, mask=of_keys[None, :])
    elif block == 0:
        tl.store(M + of_segment * KP + dims[:, None], kept)


@triton.jit
def backward_segments_kernel(
    do, Qg, Eg, Kt, decay, P, A,
    dN,
    starts, ends, num_tokens, firsts, chunks_a_row, chunks_a_sequence,
    HV, V,
    KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = VP // BV
    segment_head = tl.program_id(0) // NUM_BLOCKS
    n, head = segment_head // HV, segment_head % HV
    first, end_chunk = sequence_chunks(n, firsts, chunks_a_row, chunks_a_sequence)
    row, origin, end_token = sequence_tokens(first, end_chunk, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    rows, dims = tl.arange(0, C), tl.arange(0, KP)
    columns = (tl.program_id(0) % NUM_BLOCKS) * BV + tl.arange(0, BV)
    wide = rows[:, None] * KP + dims[None, :]
    tall = rows[None, :] * KP + dims[:, None]
    transposed = rows[None, :] * C + rows[:, None]
    token_values = rows[:, None] * (HV * V) + columns[None, :]
    dS = tl.zeros([KP, BV], tl.float32)
    for step in tl.range(0, end_chunk - first, num_stages=STAGES):
        m = tl.zeros([], tl.int32) + (end_chunk - 1 - step)
        start = origin + m * C
        live = end_token - start
        tile = m.to(tl.int64) * HV + head
        first_value = ((row.to(tl.int64) * num_tokens + start) * HV + head) * V
        inside = (rows < live)[:, None] & (columns < V)[None, :]
        d_out = tl.load(do + first_value + token_values, mask=inside, other=0.0).to(DTYPE)
        if ERASE != NONE:
            r = tl.dot(tl.load(P + tile * C * C + transposed), d_out, input_precision=PRECISION)
            r = tl.dot(tl.load(Kt + tile * C * KP + wide), dS.to(DTYPE), r, input_precision=PRECISION)
            r = tl.dot(tl.load(A + tile * C * C + transposed), r.to(DTYPE), input_precision=PRECISION)
        dS = used_in_its_trip(decayed(dS, decay, tile, dims, KP, GATE), live, GATE, ERASE)
        dS = tl.dot(tl.load(Qg + tile * C * KP + tall), d_out, dS, input_precision=PRECISION)
        if ERASE != NONE:
            dS = tl.dot(tl.load(Eg + tile * C * KP + tall), (-r).to(DTYPE), dS, input_precision=PRECISION)
    states = columns[None, :] * KP + dims[:, None]
    tl.store(dN + segment_head.to(tl.int64) * VP * KP + states, dS)
