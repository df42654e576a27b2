"""Kernel 5 where g is no vector, one program a chunk, value head and block of key channels: gradients of all but v.

From the state before the chunk, S, the gradient of the one after it, dS, and dP and dT, the gradients of the chunk's
pair products, to which the decay between two tokens is put here:

    dq = scale exp(G) do S^T + dP k      de = -exp(G) dR^ S^T + dT k      dk' = exp(G_C - G) R dS^T + dP^T q + dT^T e

Then with e = erase k: dk = dk' + erase de, d_erase = k de, and summed over channels

    dg_r = sum_{i >= r} (q dq + e de - k dk')_i + sum_i (exp(G_C - G) k R dS^T)_i + exp(G_C) sum(S dS).

rowsum(S dS) is the diagonal of a product, whose sides are at hand for other products; a given state's part that S as it
is kept does not hold comes as `carried`. Without erase and `write`, R is v. Gradients that are summed over channels are
written for each block of channels.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from glade.ops.linear_attention.triton.tiles import (
    NONE,
    SCALAR,
    VECTOR,
    chunk_tokens,
    load_columns,
    tile_of_program,
    token_head,
)


@triton.jit
def keys_backward_kernel(
    q, k, erase, q_strides, k_strides, erase_strides,
    G, decay, do, R, R_strides, dR, S_before, dS_after, dP, dT, carried,
    dq, dk, d_erase, dg,
    starts, ends, num_tokens, chunks_a_row, num_token_heads, scale,
    HV, GROUP, K, V, dq_stride, dk_stride,
    KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NUM_CARRIED: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = KP // BK
    block = tl.program_id(0) % NUM_BLOCKS
    m, head, tile = tile_of_program(tl.program_id(0) // NUM_BLOCKS, HV)
    row, start, live = chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    if PACKED and live <= 0:  # a chunk that is not used
        return
    rows, columns = tl.arange(0, C), block * BK + tl.arange(0, BK)
    q = token_head(q, q_strides, row, start, head // GROUP)
    k = token_head(k, k_strides, row, start, head // GROUP)
    first_token = row.to(tl.int64) * num_tokens + start
    first_head = first_token * HV + head
    # gradients of scalar gates: a part for each block of key channels
    of_block = block.to(tl.int64) * num_token_heads + first_head
    do += first_head * V
    R = token_head(R, R_strides, row, start, head)
    S_before += tile * KP * VP
    dS_after += tile * KP * VP
    dP += tile * C * C
    dq += first_token * dq_stride + head * K
    dk += first_token * dk_stride + head * K
    if ERASE != NONE:
        erase = token_head(erase, erase_strides, row, start, head)
        dR += first_head * V
        dT += tile * C * C
    if ERASE == VECTOR:
        d_erase += first_head * K
    elif ERASE == SCALAR:
        d_erase += of_block
    if GATE == SCALAR:
        G += tile * C
        dg += of_block
        last = tl.load(G + C - 1)
        over_chunk = tl.load(decay + tile)

    # All that is needed after the loop is asked for before it: one wait instead of two.
    q_tile = load_columns(q, q_strides, rows, live, columns, K).to(DTYPE)
    k_tile = load_columns(k, k_strides, rows, live, columns, K).to(DTYPE)
    if ERASE == VECTOR:
        gate = load_columns(erase, erase_strides, rows, live, columns, K)
    elif ERASE == SCALAR:
        gate = tl.load(erase + rows * erase_strides[1], mask=rows < live, other=0.0)
    if GATE == SCALAR:
        sums = tl.load(G + rows)
    square = rows[:, None] * C + rows[None, :]
    transposed = rows[None, :] * C + rows[:, None]
    d_products, d_products_T = tl.load(dP + square), tl.load(dP + transposed)
    with_itself = tl.load(dP + rows * C + rows)
    if ERASE != NONE:
        d_lower, d_lower_T = tl.load(dT + square), tl.load(dT + transposed)
    if GATE != NONE:
        onward = tl.zeros([BK], tl.float32)
        for part in tl.static_range(0, NUM_CARRIED):
            onward += tl.load(carried + (tile * NUM_CARRIED + part) * KP + columns)

    # Tiles are channels by rows: the registers that hold a product are then the left side of the next one as they are.
    q_sum = tl.zeros([BK, C], tl.float32)
    e_sum = tl.zeros([BK, C], tl.float32)
    k_sum = tl.zeros([BK, C], tl.float32)
    S_dS = tl.zeros([BK, BK], tl.float32)
    for first_v in tl.range(0, VP, BV, num_stages=STAGES):
        values = first_v + tl.arange(0, BV)
        inside = (values < V)[:, None] & (rows < live)[None, :]
        at = values[:, None] + rows[None, :] * (HV * V)
        d_out = tl.load(do + at, mask=inside, other=0.0).to(DTYPE)
        state_at = columns[:, None] * VP + values[None, :]
        S = tl.load(S_before + state_at)
        q_sum = tl.dot(S, d_out, q_sum, input_precision=PRECISION)
        if ERASE != NONE:
            e_sum = tl.dot(S, tl.load(dR + at, mask=inside, other=0.0), e_sum, input_precision=PRECISION)
        dS = tl.load(dS_after + state_at)
        r = load_columns(R, R_strides, rows, live, values, V).to(DTYPE)
        k_sum = tl.dot(dS, r, k_sum, input_precision=PRECISION)
        if GATE != NONE:
            S_dS = tl.dot(S, tl.trans(dS), S_dS, input_precision=PRECISION)

    if ERASE == VECTOR:
        gate = gate.to(tl.float32)
    elif ERASE == SCALAR:
        gate = gate.to(tl.float32)[None, :]
    if ERASE != NONE:
        e_tile = (gate * k_tile.to(tl.float32)).to(DTYPE)
    q_sum *= scale
    if GATE == SCALAR:
        to_row = tl.exp2(sums.to(tl.float32))[None, :]
        q_sum *= to_row
        e_sum *= -to_row
        k_sum *= tl.exp2((last - sums).to(tl.float32))[None, :]
    else:
        e_sum = -e_sum
    if GATE != NONE:
        # what goes on to the end of the chunk has part in the gradient of every row's decay
        channel = tl.arange(0, BK)
        onward += tl.sum(tl.where(channel[:, None] == channel[None, :], S_dS, 0.0), 1)
        onward = onward * over_chunk + tl.sum(k_tile.to(tl.float32) * k_sum, 1)

    later, earlier = rows[:, None], rows[None, :]
    if GATE == SCALAR:
        apart = tl.exp2(-tl.abs(sums[:, None] - sums[None, :]).to(tl.float32))
    else:
        apart = tl.full([C, C], 1.0, tl.float32)
    dp = tl.where(later > earlier, d_products.to(tl.float32) * apart, 0.0).to(DTYPE)
    dp_T = tl.where(earlier > later, d_products_T.to(tl.float32) * apart, 0.0).to(DTYPE)
    q_sum = tl.dot(k_tile, dp_T, q_sum, input_precision=PRECISION)
    k_sum = tl.dot(q_tile, dp, k_sum, input_precision=PRECISION)
    if ERASE != NONE:
        dt = tl.where(later > earlier, d_lower.to(tl.float32) * apart, 0.0).to(DTYPE)
        dt_T = tl.where(earlier > later, d_lower_T.to(tl.float32) * apart, 0.0).to(DTYPE)
        e_sum = tl.dot(k_tile, dt_T, e_sum, input_precision=PRECISION)
        k_sum = tl.dot(e_tile, dt, k_sum, input_precision=PRECISION)

    inside = (columns < K)[:, None] & (rows < live)[None, :]
    at = columns[:, None] + rows[None, :] * (HV * K)
    wide_q, wide_k = q_tile.to(tl.float32), k_tile.to(tl.float32)
    if GATE != NONE:
        # the diagonal pairs, which do not decay, are not in these sums yet
        per_row = wide_q * q_sum - wide_k * k_sum
        if ERASE != NONE:
            per_row += gate * wide_k * e_sum
        gradient = tl.cumsum(tl.sum(per_row, 0), 0, reverse=True) + tl.sum(onward, 0)
        tl.store(dg + rows * HV, gradient, mask=rows < live)
    with_itself = with_itself.to(tl.float32)[None, :]
    at_q = dq + columns[:, None] + rows[None, :] * dq_stride
    tl.store(at_q, (q_sum + with_itself * wide_k).to(dq.dtype.element_ty), mask=inside)
    k_sum += with_itself * wide_q
    if ERASE != NONE:
        k_sum += gate * e_sum
        if ERASE == VECTOR:
            tl.store(d_erase + at, (wide_k * e_sum).to(d_erase.dtype.element_ty), mask=inside)
        else:
            tl.store(d_erase + rows * HV, tl.sum(wide_k * e_sum, 0), mask=rows < live)
    at_k = dk + columns[:, None] + rows[None, :] * dk_stride
    tl.store(at_k, k_sum.to(dk.dtype.element_ty), mask=inside)
