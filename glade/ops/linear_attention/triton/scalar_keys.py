"""Scalar gates, kernel 4, one program a chunk, value head and block of key channels: gradients of q, k, erase and g.

The gradients of the pair products, do R^T and -dR^ R^T, are made here and never reach memory. With S the state before
the chunk, dS the gradient of the one after it, D as in `scalar_states.py` and P = tril(D * do R^T, -1),
T = -tril(D * dR^ R^T, -1):

    dq = scale (exp(G) (do S^T) + P k)                de = -exp(G) (dR^ S^T) + T k
    dk' = exp(G_C - G) (R dS^T) + scale P^T q + T^T (erase k)

and, with the diagonal of do R^T, which does not decay, added to dq and dk' last,

    dk = dk' + erase de        d_erase = k de
    dg_r = sum_{i >= r} (q dq + erase k de - k dk')_i + sum_i (exp(G_C - G) k (R dS^T))_i + exp(G_C) sum(S * dS).

Without erase R is write v, read again. Gradients of the gates are written for each block of key channels.
"""

# Triton is not installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from glade.ops.linear_attention.triton.tiles import NONE, SCALAR, VECTOR, chunk_tokens, load_columns, token_head


@triton.jit
def scalar_keys_kernel(
    q, k, v, write, q_strides, k_strides, v_strides, write_strides,
    G, erase_rows, write_rows, do, R, dR, S_before, dS_after,
    dq, dk, d_erase, dg,
    starts, ends, num_tokens, chunks_a_row, num_token_heads, scale,
    HV, GROUP, K, V,
    KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = KP // BK
    block, m, head = tl.program_id(0) % NUM_BLOCKS, tl.program_id(0) // NUM_BLOCKS, tl.program_id(1)
    row, start, live = chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    tile = m.to(tl.int64) * HV + head
    rows, columns = tl.arange(0, C), block * BK + tl.arange(0, BK)
    q = token_head(q, q_strides, row, start, head // GROUP)
    k = token_head(k, k_strides, row, start, head // GROUP)
    first_head = (row.to(tl.int64) * num_tokens + start) * HV + head
    of_block = block.to(tl.int64) * num_token_heads + first_head
    do += first_head * V
    S_before += tile * KP * VP
    dS_after += tile * KP * VP
    if ERASE != NONE:
        R += tile * C * VP
        dR += tile * C * VP
    else:
        v = token_head(v, v_strides, row, start, head)
        if WRITE == VECTOR:
            write = token_head(write, write_strides, row, start, head)

    # Sums over value channels, as channels by rows; the products of pairs as later by earlier token.
    q_sum = tl.zeros([BK, C], tl.float32)
    e_sum = tl.zeros([BK, C], tl.float32)
    k_sum = tl.zeros([BK, C], tl.float32)
    d_products = tl.zeros([C, C], tl.float32)
    d_lower = tl.zeros([C, C], tl.float32)
    carried = tl.zeros([BK], tl.float32)
    for first_v in tl.range(0, VP, BV, num_stages=STAGES):
        values = first_v + tl.arange(0, BV)
        inside = (values < V)[:, None] & (rows < live)[None, :]
        d_out = tl.load(do + values[:, None] + rows[None, :] * (HV * V), mask=inside, other=0.0).to(DTYPE)
        chunk_at = values[:, None] + rows[None, :] * VP
        state_at = columns[:, None] * VP + values[None, :]
        if ERASE != NONE:
            r = tl.load(R + chunk_at)
        elif WRITE == NONE:
            r = load_columns(v, v_strides, rows, live, values, V).to(DTYPE)
        else:
            z = load_columns(v, v_strides, rows, live, values, V).to(tl.float32)
            if WRITE == SCALAR:
                z *= tl.load(write_rows + tile * C + rows)[None, :]
            else:
                z *= load_columns(write, write_strides, rows, live, values, V).to(tl.float32)
            r = z.to(DTYPE)
        S, dS = tl.load(S_before + state_at), tl.load(dS_after + state_at)
        q_sum = tl.dot(S, d_out, q_sum, input_precision=PRECISION)
        k_sum = tl.dot(dS, r, k_sum, input_precision=PRECISION)
        d_products = tl.dot(tl.trans(d_out), r, d_products, input_precision=PRECISION)
        if ERASE != NONE:
            dr = tl.load(dR + chunk_at)
            e_sum = tl.dot(S, dr, e_sum, input_precision=PRECISION)
            d_lower = tl.dot(tl.trans(dr), r, d_lower, input_precision=PRECISION)
        if GATE == SCALAR:
            carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)

    q_tile = load_columns(q, q_strides, rows, live, columns, K).to(DTYPE)
    k_tile = load_columns(k, k_strides, rows, live, columns, K).to(DTYPE)
    q_sum *= scale
    d_products *= scale
    later, earlier = rows[:, None], rows[None, :]
    with_itself = tl.sum(tl.where(later == earlier, d_products, 0.0), 0)[None, :]
    if GATE == SCALAR:
        sums = tl.load(G + tile * C + rows)
        last = tl.load(G + tile * C + C - 1)
        to_row = tl.exp2(sums.to(tl.float32))[None, :]
        q_sum *= to_row
        e_sum *= -to_row
        k_sum *= tl.exp2((last - sums).to(tl.float32))[None, :]
        # what goes on to the end of the chunk has part in the gradient of every row's decay
        onward = tl.sum(carried, 0) * tl.exp2(last.to(tl.float32))
        onward += tl.sum(tl.sum(k_tile.to(tl.float32) * k_sum, 1), 0)
        apart = tl.exp2(tl.minimum(sums[:, None] - sums[None, :], 0.0).to(tl.float32))
        d_products *= apart
        d_lower *= -apart
    else:
        e_sum = -e_sum
        d_lower = -d_lower
    dp = tl.where(later > earlier, d_products, 0.0).to(DTYPE)
    q_sum = tl.dot(k_tile, tl.trans(dp), q_sum, input_precision=PRECISION)
    k_sum = tl.dot(q_tile, dp, k_sum, input_precision=PRECISION)
    if ERASE != NONE:
        gate = tl.load(erase_rows + tile * C + rows)[None, :]
        dt = tl.where(later > earlier, d_lower, 0.0).to(DTYPE)
        e_sum = tl.dot(k_tile, tl.trans(dt), e_sum, input_precision=PRECISION)
        k_sum = tl.dot((gate * k_tile.to(tl.float32)).to(DTYPE), dt, k_sum, input_precision=PRECISION)

    inside = (columns < K)[:, None] & (rows < live)[None, :]
    at = first_head * K + columns[:, None] + rows[None, :] * (HV * K)
    wide_q, wide_k = q_tile.to(tl.float32), k_tile.to(tl.float32)
    if GATE == SCALAR:
        per_row = wide_q * q_sum - wide_k * k_sum
        if ERASE != NONE:
            per_row += gate * wide_k * e_sum
        gradient = tl.cumsum(tl.sum(per_row, 0), 0, reverse=True) + onward
        tl.store(dg + of_block + rows * HV, gradient, mask=rows < live)
    tl.store(dq + at, (q_sum + with_itself * wide_k).to(dq.dtype.element_ty), mask=inside)
    k_sum += with_itself * wide_q
    if ERASE != NONE:
        k_sum += gate * e_sum
        tl.store(d_erase + of_block + rows * HV, tl.sum(wide_k * e_sum, 0), mask=rows < live)
    tl.store(dk + at, k_sum.to(dk.dtype.element_ty), mask=inside)
