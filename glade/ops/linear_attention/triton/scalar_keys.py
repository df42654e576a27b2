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

from glade.ops.linear_attention.triton.tiles import (
    NONE,
    SCALAR,
    chunk_tokens,
    load_gate,
    load_rows,
    log2_decay,
    token_head,
)


@triton.jit
def load_values(x, rows, live, values, HV, V):
    """[rows, values] of a tensor laid out as v is, from its pointer at the chunk's first token and the head."""
    inside = (rows < live)[:, None] & (values < V)[None, :]
    return tl.load(x + rows[:, None] * (HV * V) + values[None, :], mask=inside, other=0.0)


@triton.jit
def load_written(
    R, v, v_strides, write, write_strides, rows, live, values, HV, V,
    ERASE: tl.constexpr, WRITE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[rows, values], what each token writes: R, and without erase write v."""
    if ERASE != NONE:
        r = load_values(R, rows, live, values, HV, V)
    else:
        r = load_rows(v, v_strides, rows, live, values, V)
        if WRITE != NONE:
            r = r.to(tl.float32) * load_gate(write, write_strides, rows, live, values, V, WRITE)
    return r.to(DTYPE)


@triton.jit
def scalar_keys_kernel(
    q, k, v, g, erase, write, q_strides, k_strides, v_strides, g_strides, erase_strides, write_strides,
    do, R, dR, S_before, dS_after,
    dq, dk, d_erase, dg,
    starts, ends, num_tokens, chunks_a_row, num_token_heads, scale,
    HV, GROUP, K, V,
    KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, G_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = KP // BK
    block, m, head = tl.program_id(0) % NUM_BLOCKS, tl.program_id(0) // NUM_BLOCKS, tl.program_id(1)
    row, start, live = chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    tile = m.to(tl.int64) * HV + head
    rows, columns = tl.arange(0, C), block * BK + tl.arange(0, BK)
    first_head = (row.to(tl.int64) * num_tokens + start) * HV + head
    of_block = block.to(tl.int64) * num_token_heads + first_head
    do += first_head * V
    S_before += tile * KP * VP
    dS_after += tile * KP * VP
    if ERASE != NONE:
        R += first_head * V
        dR += first_head * V
    v = token_head(v, v_strides, row, start, head)
    if WRITE != NONE:
        write = token_head(write, write_strides, row, start, head)
    later, earlier = rows[:, None], rows[None, :]

    if GATE == SCALAR:
        logs = tl.load(token_head(g, g_strides, row, start, head) + rows * g_strides[1], mask=rows < live, other=0.0)
        logs = log2_decay(logs, G_TYPE)
        sums, last = tl.cumsum(logs, 0), tl.sum(logs, 0)
        to_row = tl.exp2(sums.to(tl.float32))[:, None]
    if ERASE != NONE:
        at = token_head(erase, erase_strides, row, start, head) + rows * erase_strides[1]
        gate = tl.load(at, mask=rows < live, other=0.0).to(tl.float32)

    # Products of pairs, as later by earlier token.
    d_products = tl.zeros([C, C], tl.float32)
    d_lower = tl.zeros([C, C], tl.float32)
    for first_v in tl.static_range(0, VP, BV):
        values = first_v + tl.arange(0, BV)
        d_out = load_values(do, rows, live, values, HV, V).to(DTYPE)
        r = load_written(R, v, v_strides, write, write_strides, rows, live, values, HV, V, ERASE, WRITE, DTYPE)
        d_products = tl.dot(d_out, tl.trans(r), d_products, input_precision=PRECISION)
        if ERASE != NONE:
            dr = load_values(dR, rows, live, values, HV, V)
            d_lower = tl.dot(dr, tl.trans(r), d_lower, input_precision=PRECISION)
    with_itself = tl.sum(tl.where(later == earlier, d_products, 0.0), 1)[:, None] * scale
    if GATE == SCALAR:
        apart = tl.exp2(tl.minimum(sums[:, None] - sums[None, :], 0.0).to(tl.float32))
        d_products *= apart
        d_lower *= apart
    dp = tl.where(later > earlier, d_products * scale, 0.0).to(DTYPE)
    dt = tl.where(later > earlier, -d_lower, 0.0).to(DTYPE)

    # The gradients that read S: of q, and of the erasing key.
    q_sum = tl.zeros([C, BK], tl.float32)
    e_sum = tl.zeros([C, BK], tl.float32)
    for first_v in tl.static_range(0, VP, BV):
        values = first_v + tl.arange(0, BV)
        S = tl.load(S_before + values[:, None] * KP + columns[None, :])
        d_out = load_values(do, rows, live, values, HV, V).to(DTYPE)
        q_sum = tl.dot(d_out, S, q_sum, input_precision=PRECISION)
        if ERASE != NONE:
            dr = load_values(dR, rows, live, values, HV, V)
            e_sum = tl.dot(dr, S, e_sum, input_precision=PRECISION)
    k_tile = load_rows(token_head(k, k_strides, row, start, head // GROUP), k_strides, rows, live, columns, K).to(DTYPE)
    q_tile = load_rows(token_head(q, q_strides, row, start, head // GROUP), q_strides, rows, live, columns, K).to(DTYPE)
    wide_q, wide_k = q_tile.to(tl.float32), k_tile.to(tl.float32)
    q_sum *= scale
    if GATE == SCALAR:
        q_sum *= to_row
        e_sum *= to_row
    q_sum = tl.dot(dp, k_tile, q_sum, input_precision=PRECISION)
    inside = (rows < live)[:, None] & (columns < K)[None, :]
    at = first_head * K + rows[:, None] * (HV * K) + columns[None, :]
    tl.store(dq + at, (q_sum + with_itself * wide_k).to(dq.dtype.element_ty), mask=inside)
    of_row = tl.sum(wide_q * q_sum, 1)
    if ERASE != NONE:
        e_sum = tl.dot(dt, k_tile, -e_sum, input_precision=PRECISION)
        of_erase = tl.sum(wide_k * e_sum, 1)
        tl.store(d_erase + of_block + rows * HV, of_erase, mask=rows < live)
        of_row += gate * of_erase

    # Products of pairs again, as earlier by later token: a product in registers is the left side of the next as it is;
    # its transpose would go through shared memory.
    d_products_t = tl.zeros([C, C], tl.float32)
    d_lower_t = tl.zeros([C, C], tl.float32)
    k_sum = tl.zeros([C, BK], tl.float32)
    carried = tl.zeros([BV], tl.float32)
    for first_v in tl.static_range(0, VP, BV):
        values = first_v + tl.arange(0, BV)
        d_out = load_values(do, rows, live, values, HV, V).to(DTYPE)
        r = load_written(R, v, v_strides, write, write_strides, rows, live, values, HV, V, ERASE, WRITE, DTYPE)
        d_products_t = tl.dot(r, tl.trans(d_out), d_products_t, input_precision=PRECISION)
        if ERASE != NONE:
            dr = load_values(dR, rows, live, values, HV, V)
            d_lower_t = tl.dot(r, tl.trans(dr), d_lower_t, input_precision=PRECISION)
    if GATE == SCALAR:
        apart = tl.exp2(tl.minimum(sums[None, :] - sums[:, None], 0.0).to(tl.float32))
        d_products_t *= apart
        d_lower_t *= apart
    dp = tl.where(later < earlier, d_products_t * scale, 0.0).to(DTYPE)
    if ERASE != NONE:
        dt = tl.where(later < earlier, -d_lower_t * gate[None, :], 0.0).to(DTYPE)
    for first_v in tl.static_range(0, VP, BV):
        values = first_v + tl.arange(0, BV)
        state_at = values[:, None] * KP + columns[None, :]
        dS = tl.load(dS_after + state_at)
        r = load_written(R, v, v_strides, write, write_strides, rows, live, values, HV, V, ERASE, WRITE, DTYPE)
        k_sum = tl.dot(r, dS, k_sum, input_precision=PRECISION)
        if GATE == SCALAR:
            carried += tl.sum(tl.load(S_before + state_at).to(tl.float32) * dS.to(tl.float32), 1)
    if GATE == SCALAR:
        k_sum *= tl.exp2((last - sums).to(tl.float32))[:, None]
        # what goes on to the end of the chunk has part in the gradient of every row's decay
        onward = tl.sum(tl.sum(wide_k * k_sum, 1), 0) + tl.exp2(last.to(tl.float32)) * tl.sum(carried, 0)
    k_sum = tl.dot(dp, q_tile, k_sum, input_precision=PRECISION)
    if ERASE != NONE:
        k_sum = tl.dot(dt, k_tile, k_sum, input_precision=PRECISION)
    if GATE == SCALAR:
        gradient = tl.cumsum(of_row - tl.sum(wide_k * k_sum, 1), 0, reverse=True) + onward
        tl.store(dg + of_block + rows * HV, gradient, mask=rows < live)
    k_sum += with_itself * wide_q
    if ERASE != NONE:
        k_sum += gate[:, None] * e_sum
    tl.store(dk + at, k_sum.to(dk.dtype.element_ty), mask=inside)
