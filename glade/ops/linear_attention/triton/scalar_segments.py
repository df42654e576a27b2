"""Scalar gates, one long sequence: what each of its segments does to a state, all segments at once (`segments.py`).

N is the state after the segment where the one before it is zero; it needs no q, and nothing of the pass is kept. M is
what the same steps make of the unit matrix where nothing is written,

    M = product over chunks of (exp(G_C) I - (exp(G_C - G) k)^T A erase exp(G) k),

so that its columns follow those of N as further value channels whose v is zero. Without erase M is exp of the segment's
sum of logs. dN is the gradient of the state before the segment where that of the one after it is zero. All is
held as in `scalar_states.py`.

Chunks from which less than 2^-126 of a state reaches the border are left out (`chunks_that_matter`): it is what fp32's
smallest normal number would make of that state. Where not even the segment's first chunk is left, M is zero, and is not
made; `reaches` says so to the scan.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from glade.ops.linear_attention.triton.scalar_states import chunk_decays, values_to_write
from glade.ops.linear_attention.triton.tiles import (
    NONE,
    SCALAR,
    load_rows,
    pair_decay,
    sequence_chunks,
    sequence_tokens,
    token_head,
    used_in_its_trip,
)

FADED = tl.constexpr(-126.0)
CHUNKS_AT_ONCE = tl.constexpr(64)


@triton.jit
def chunks_that_matter(fading, first, end, head, HV, REVERSE: tl.constexpr):
    """How many chunks of a segment, counted from its end, or REVERSE from its beginning, have part in what is there:
    with what may grow in them, and the chunks between leave of that."""
    among, matter, faded = tl.arange(0, CHUNKS_AT_ONCE), 0, 0.0
    for block in tl.range(0, end - first, CHUNKS_AT_ONCE):
        away = block + among
        m = first + away if REVERSE else end - 1 - away
        of_chunk = fading + (m.to(tl.int64) * HV + head) * 2
        logs = tl.load(of_chunk, mask=away < end - first, other=0.0)
        grown = tl.load(of_chunk + 1, mask=away < end - first, other=0.0)
        between = faded + tl.cumsum(logs, 0) - logs
        reaches = (between + grown > FADED) & (away < end - first)
        matter = tl.maximum(matter, tl.max(tl.where(reaches, away + 1, 0), 0))
        faded += tl.sum(logs, 0)
    return matter


@triton.jit
def scalar_forward_segments_kernel(
    k, v, write, k_strides, v_strides, write_strides,
    G, erase_rows, write_rows, A, fading,
    M, N, reaches,
    starts, ends, num_tokens, firsts, chunks_a_row, chunks_a_sequence,
    HV, GROUP, K, V,
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
    square = rows[:, None] * C + rows[None, :]
    of_segment = segment_head.to(tl.int64)
    # behind the value channels the rows of the unit matrix
    S = tl.where(columns[:, None] - VP == dims[None, :], 1.0, 0.0)
    kept = 1.0
    if GATE == SCALAR:
        matter = chunks_that_matter(fading, first, end_chunk, head, HV, False)
        reaching = matter == end_chunk - first
        first = end_chunk - matter
        if ERASE != NONE:
            S = tl.where(reaching, S, 0.0)
            first = tl.where((block * BV < VP) | reaching, first, end_chunk)
            if block == 0:
                tl.store(reaches + segment_head, tl.where(reaching, 1, 0))
    for m in tl.range(first, end_chunk, num_stages=STAGES):
        m = tl.zeros([], tl.int32) + m  # a tensor, in Triton's interpreter too
        start = origin + m * C
        live = end_token - start
        tile = m.to(tl.int64) * HV + head
        k_head = token_head(k, k_strides, row, start, head // GROUP)
        k_tile = load_rows(k_head, k_strides, rows, live, dims, K).to(DTYPE)
        if GATE == SCALAR:
            _, to_row, to_end, decay = chunk_decays(G, tile, rows, C)
        z = values_to_write(
            v, v_strides, None, write, write_strides, write_rows, N, row, start, head, tile, live, block * BV, V,
            C, BV, WRITE,
        )  # fmt: skip
        if ERASE != NONE:
            erased = tl.load(erase_rows + tile * C + rows)
            if GATE == SCALAR:
                erased *= to_row
            z -= erased[None, :] * tl.dot(S.to(DTYPE), tl.trans(k_tile), input_precision=PRECISION)
            inverse = tl.load(A + tile * C * C + square)
            z = tl.dot(z.to(DTYPE), tl.trans(inverse), input_precision=PRECISION)
        if GATE == SCALAR:
            z *= to_end[None, :]
            S *= decay
            kept *= decay
        S = used_in_its_trip(S, live, GATE, ERASE)
        S = tl.dot(z.to(DTYPE), k_tile, S, input_precision=PRECISION)
    states = columns[:, None] * KP + dims[None, :]
    tl.store(N + of_segment * VP * KP + states, S, mask=(columns < VP)[:, None])
    if ERASE != NONE:
        of_keys = (columns >= VP) & (columns < VP + KP)
        tl.store(M + of_segment * KP * KP + states - VP * KP, S, mask=of_keys[:, None])
    elif block == 0:
        tl.store(M + of_segment * KP + dims, tl.zeros([KP], tl.float32) + kept)


@triton.jit
def scalar_backward_segments_kernel(
    do, q, k, q_strides, k_strides,
    G, erase_rows, A, fading,
    dN,
    starts, ends, num_tokens, firsts, chunks_a_row, chunks_a_sequence, scale,
    HV, GROUP, K, V,
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
    not_after = rows[:, None] >= rows[None, :]
    square = rows[:, None] * C + rows[None, :]
    dS = tl.zeros([BV, KP], tl.float32)
    if GATE == SCALAR:
        end_chunk = first + chunks_that_matter(fading, first, end_chunk, head, HV, True)
    for step in tl.range(0, end_chunk - first, num_stages=STAGES):
        m = tl.zeros([], tl.int32) + (end_chunk - 1 - step)
        start = origin + m * C
        live = end_token - start
        tile = m.to(tl.int64) * HV + head
        q_head = token_head(q, q_strides, row, start, head // GROUP)
        q_tile = load_rows(q_head, q_strides, rows, live, dims, K).to(DTYPE)
        first_head = (row.to(tl.int64) * num_tokens + start) * HV + head
        at_out = do + first_head * V + columns[None, :] + rows[:, None] * (HV * V)
        d_out = tl.load(at_out, mask=(rows < live)[:, None] & (columns < V)[None, :], other=0.0).to(DTYPE)
        d_out = tl.trans(d_out)
        if GATE == SCALAR:
            sums, to_row, to_end, decay = chunk_decays(G, tile, rows, C)
        if ERASE != NONE:
            k_head = token_head(k, k_strides, row, start, head // GROUP)
            k_tile = load_rows(k_head, k_strides, rows, live, dims, K).to(DTYPE)
            products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
            if GATE == SCALAR:
                products *= pair_decay(sums, C)
            products = tl.where(not_after, products, 0.0).to(DTYPE)
            z = tl.dot(dS.to(DTYPE), tl.trans(k_tile), input_precision=PRECISION)
            if GATE == SCALAR:
                z *= to_end[None, :]
            z = tl.dot(d_out, products, z, input_precision=PRECISION)
            z = tl.dot(z.to(DTYPE), tl.load(A + tile * C * C + square), input_precision=PRECISION)
        d_out = d_out.to(tl.float32) * scale
        if GATE == SCALAR:
            d_out *= to_row[None, :]
            dS *= decay
        dS = used_in_its_trip(dS, live, GATE, ERASE)
        dS = tl.dot(d_out.to(DTYPE), q_tile, dS, input_precision=PRECISION)
        if ERASE != NONE:
            erased = tl.load(erase_rows + tile * C + rows)
            if GATE == SCALAR:
                erased *= to_row
            dS = tl.dot((z * -erased[None, :]).to(DTYPE), k_tile, dS, input_precision=PRECISION)
    states = columns[:, None] * KP + dims[None, :]
    tl.store(dN + segment_head.to(tl.int64) * VP * KP + states, dS)
