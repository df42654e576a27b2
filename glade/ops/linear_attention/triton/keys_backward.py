"""Kernel 5, one program a chunk, value head and block of key channels: gradients of q, k, erase and g.

From the state before the chunk, S, and the gradient of the one after it, dS:

    dq = scale exp(G) do S^T      de = -exp(G) dR^ S^T      dk' = exp(G_C - G) R dS^T

and from the pairs of the chunk, by the levels of `prepare.py` with each level's factors x and e = erase k:
dq += x (dP_l (x k)), de += x (dT_l (x k)) and dk' += x (dP_l^T (x q) + dT_l^T (x e)).
Then dk = dk' + erase de, d_erase = k de, and per channel

    dg_r = sum_{i >= r} (q dq + e de - k dk')_i + sum_i (exp(G_C - G) k R dS^T)_i + exp(G_C) rowsum(S dS).

Gradients that are summed over channels (those of scalar gates) are written for each block of channels.
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
    level_pairs,
    load_columns,
    split_logs,
    to_anchor,
    token_head,
)


@triton.jit
def keys_backward_kernel(
    q, k, erase, q_strides, k_strides, erase_strides,
    G, do, R, dR, S_before, dS_after, dP, dT, carried,
    dq, dk, d_erase, dg,
    starts, ends, num_tokens, chunks_a_row, num_token_heads, scale,
    HV, GROUP, K, V, dq_stride, dk_stride,
    KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NUM_CARRIED: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = KP // BK
    block, m, head = tl.program_id(0) % NUM_BLOCKS, tl.program_id(0) // NUM_BLOCKS, tl.program_id(1)
    row, start, live = chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    tile = m.to(tl.int64) * HV + head
    rows, columns = tl.arange(0, C), block * BK + tl.arange(0, BK)
    q = token_head(q, q_strides, row, start, head // GROUP)
    k = token_head(k, k_strides, row, start, head // GROUP)
    first_token = row.to(tl.int64) * num_tokens + start
    first_head = first_token * HV + head
    # gradients of scalar gates: a part for each block of key channels
    of_block = block.to(tl.int64) * num_token_heads + first_head
    do += first_head * V
    R += tile * C * VP
    S_before += tile * KP * VP
    dS_after += tile * KP * VP
    dP += tile * C * C
    dq += first_token * dq_stride + head * K
    dk += first_token * dk_stride + head * K
    if ERASE != NONE:
        erase = token_head(erase, erase_strides, row, start, head)
        dR += tile * C * VP
        dT += tile * C * C
    if ERASE == VECTOR:
        d_erase += first_head * K
    elif ERASE == SCALAR:
        d_erase += of_block
    if GATE == VECTOR:
        G += tile * C * KP
        dg += first_head * K
        last = tl.load(G + (C - 1) * KP + columns)
    elif GATE == SCALAR:
        G += tile * C
        dg += of_block
        last = tl.load(G + C - 1)

    # All that is needed after the loop is asked for before it: one wait instead of two.
    q_tile = load_columns(q, q_strides, rows, live, columns, K).to(DTYPE)
    k_tile = load_columns(k, k_strides, rows, live, columns, K).to(DTYPE)
    if ERASE == VECTOR:
        gate = load_columns(erase, erase_strides, rows, live, columns, K)
    elif ERASE == SCALAR:
        gate = tl.load(erase + rows * erase_strides[1], mask=rows < live, other=0.0)
    if GATE == VECTOR:
        sums = tl.load(G + columns[:, None] + rows[None, :] * KP)
        row_before = tl.load(G + columns[:, None] + (rows[None, :] - 1) * KP, mask=(rows > 0)[None, :], other=0.0)
    elif GATE == SCALAR:
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
    for first_v in tl.range(0, VP, BV, num_stages=STAGES):
        values = first_v + tl.arange(0, BV)
        inside = (values < V)[:, None] & (rows < live)[None, :]
        d_out = tl.load(do + values[:, None] + rows[None, :] * (HV * V), mask=inside, other=0.0).to(DTYPE)
        chunk_at = values[:, None] + rows[None, :] * VP
        state_at = columns[:, None] * VP + values[None, :]
        S = tl.load(S_before + state_at)
        q_sum = tl.dot(S, d_out, q_sum, input_precision=PRECISION)
        if ERASE != NONE:
            e_sum = tl.dot(S, tl.load(dR + chunk_at), e_sum, input_precision=PRECISION)
        k_sum = tl.dot(tl.load(dS_after + state_at), tl.load(R + chunk_at), k_sum, input_precision=PRECISION)

    if ERASE == VECTOR:
        gate = gate.to(tl.float32)
    elif ERASE == SCALAR:
        gate = gate.to(tl.float32)[None, :]
    if ERASE != NONE:
        e_tile = (gate * k_tile.to(tl.float32)).to(DTYPE)
    q_sum *= scale
    if GATE == VECTOR:
        to_row = tl.exp2(sums.to(tl.float32))
        q_sum *= to_row
        e_sum *= -to_row
        k_sum *= tl.exp2((last[:, None] - sums).to(tl.float32))
    elif GATE == SCALAR:
        to_row = tl.exp2(sums.to(tl.float32))[None, :]
        q_sum *= to_row
        e_sum *= -to_row
        k_sum *= tl.exp2((last - sums).to(tl.float32))[None, :]
    else:
        e_sum = -e_sum
    if GATE != NONE:
        # what goes on to the end of the chunk has part in the gradient of every row's decay
        onward = onward * tl.exp2(last.to(tl.float32)) + tl.sum(k_tile.to(tl.float32) * k_sum, 1)

    later, earlier = rows[:, None], rows[None, :]
    if GATE == VECTOR:
        logs, rest_of_logs = split_logs(sums - row_before, DTYPE)
        for level in tl.range(0, LEVELS, num_stages=1):
            on_the_way = tl.where(to_anchor(rows[None, :], rows[:, None], level), 1.0, 0.0).to(DTYPE)
            exponent = tl.dot(logs, on_the_way, input_precision=PRECISION)
            exponent = tl.dot(rest_of_logs, on_the_way, exponent, input_precision=PRECISION)
            x = tl.exp2(tl.minimum(exponent, 0.0))
            pairs, pairs_T = level_pairs(later, earlier, level), level_pairs(earlier, later, level)
            xk = (k_tile.to(tl.float32) * x).to(DTYPE)
            xq = (q_tile.to(tl.float32) * x).to(DTYPE)
            dp, dp_T = tl.where(pairs, d_products, 0.0), tl.where(pairs_T, d_products_T, 0.0)
            q_sum += x * tl.dot(xk, dp_T, input_precision=PRECISION)
            to_k = tl.dot(xq, dp, input_precision=PRECISION)
            if ERASE != NONE:
                xe = (e_tile.to(tl.float32) * x).to(DTYPE)
                dt, dt_T = tl.where(pairs, d_lower, 0.0), tl.where(pairs_T, d_lower_T, 0.0)
                e_sum += x * tl.dot(xk, dt_T, input_precision=PRECISION)
                to_k = tl.dot(xe, dt, to_k, input_precision=PRECISION)
            k_sum += x * to_k
    else:
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
        if GATE == VECTOR:
            # the sum from each row on, as products with zeros and ones: a scan would pass numbers from thread to thread
            from_here = tl.where(rows[:, None] >= rows[None, :], 1.0, 0.0).to(DTYPE)
            high, rest = split_logs(per_row, DTYPE)
            gradient = tl.dot(rest, from_here, input_precision=PRECISION) + onward[:, None]
            gradient = tl.dot(high, from_here, gradient, input_precision=PRECISION)
            tl.store(dg + at, gradient.to(dg.dtype.element_ty), mask=inside)
        else:
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
