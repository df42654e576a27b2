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

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from glade.ops.linear_attention.triton.scalar_states import kept_block_at
from glade.ops.linear_attention.triton.tiles import (
    NONE,
    SCALAR,
    chunk_tokens,
    load_gate,
    load_rows,
    log2_decay,
    tile_of_program,
    token_head,
)


@triton.jit
def load_values(x, rows, live, values, V, stride):
    """[rows, values] from the pointer x at the chunk's first token and the head, `stride` from a token to the next."""
    inside = (rows < live)[:, None] & (values < V)[None, :]
    return tl.load(x + rows[:, None] * stride + values[None, :], mask=inside, other=0.0)


@triton.jit
def load_written(
    R, v, v_strides, write, write_strides, rows, live, values, V, VP,
    ERASE: tl.constexpr, WRITE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[rows, values], what each token writes: R, and without erase write v."""
    if ERASE != NONE:
        r = load_values(R, rows, live, values, V, VP)
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
    starts, ends, num_tokens, chunks_a_row, scale,
    HV, GROUP, K, V, dq_stride, dk_stride,
    KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, G_TYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m, head, tile = tile_of_program(tl.program_id(0), HV)
    row, start, live = chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    if PACKED and live <= 0:  # a chunk that is not used
        return
    rows, values = tl.arange(0, C), tl.arange(0, VP)
    first_token = row.to(tl.int64) * num_tokens + start
    first_head = first_token * HV + head
    v = token_head(v, v_strides, row, start, head)
    if WRITE != NONE:
        write = token_head(write, write_strides, row, start, head)
    # all that is read before the loop is asked for before any of it is used: one wait instead of three
    d_out = load_values(do + first_head * V, rows, live, values, V, HV * V).to(DTYPE)
    of_span = tile * C * VP
    r = load_written(R + of_span, v, v_strides, write, write_strides, rows, live, values, V, VP, ERASE, WRITE, DTYPE)
    if ERASE != NONE:
        dr = load_values(dR + of_span, rows, live, values, V, VP)
        of_gate = token_head(erase, erase_strides, row, start, head) + rows * erase_strides[1]
        gate = tl.load(of_gate, mask=rows < live, other=0.0).to(tl.float32)
    if GATE == SCALAR:
        logs = tl.load(token_head(g, g_strides, row, start, head) + rows * g_strides[1], mask=rows < live, other=0.0)
        logs = log2_decay(logs, G_TYPE)
        sums, last = tl.cumsum(logs, 0), tl.sum(logs, 0)
        to_row = tl.exp2(sums.to(tl.float32))[:, None]
        to_end = tl.exp2((last - sums).to(tl.float32))[:, None]

    # Products of pairs, as later by earlier token and the other way round. A product in registers is the left side of
    # the next as it is, its transpose one in shared memory; of two there would be too many for two programs.
    later, earlier = rows[:, None], rows[None, :]
    d_products = tl.dot(d_out, tl.trans(r), input_precision=PRECISION)
    with_itself = tl.sum(tl.where(later == earlier, d_products, 0.0), 1)[:, None] * scale
    if GATE == SCALAR:
        d_products *= tl.exp2(tl.minimum(sums[:, None] - sums[None, :], 0.0).to(tl.float32))
    dp = tl.where(later > earlier, d_products * scale, 0.0).to(DTYPE)
    if ERASE == NONE:
        dp_t = tl.trans(dp)
    else:
        d_products = tl.dot(r, tl.trans(d_out), input_precision=PRECISION)
        if GATE == SCALAR:
            d_products *= tl.exp2(tl.minimum(sums[None, :] - sums[:, None], 0.0).to(tl.float32))
        dp_t = tl.where(later < earlier, d_products * scale, 0.0).to(DTYPE)
        d_lower = tl.dot(dr, tl.trans(r), input_precision=PRECISION)
        if GATE == SCALAR:
            d_lower *= tl.exp2(tl.minimum(sums[:, None] - sums[None, :], 0.0).to(tl.float32))
        d_lower = tl.where(later > earlier, -d_lower, 0.0)
        dt, dt_t = d_lower.to(DTYPE), tl.trans((d_lower * gate[:, None]).to(DTYPE))

    q = token_head(q, q_strides, row, start, head // GROUP)
    k = token_head(k, k_strides, row, start, head // GROUP)
    dq += first_token * dq_stride + head * K
    dk += first_token * dk_stride + head * K
    states = tile * KP * VP
    of_row = tl.zeros([C], tl.float32)
    of_erase = tl.zeros([C], tl.float32)
    onward = tl.zeros([C], tl.float32)
    carried = tl.zeros([VP], tl.float32)
    for first_k in tl.range(0, KP, BK, num_stages=STAGES):
        columns = first_k + tl.arange(0, BK)
        state_at = kept_block_at(states, values[:, None], first_k, VP, BK)
        S, dS = tl.load(S_before + state_at), tl.load(dS_after + state_at)
        q_tile = load_rows(q, q_strides, rows, live, columns, K).to(DTYPE)
        k_tile = load_rows(k, k_strides, rows, live, columns, K).to(DTYPE)
        q_sum = tl.dot(d_out, S, input_precision=PRECISION) * scale
        k_sum = tl.dot(r, dS, input_precision=PRECISION)
        wide_q, wide_k = q_tile.to(tl.float32), k_tile.to(tl.float32)
        if GATE == SCALAR:
            q_sum *= to_row
            k_sum *= to_end
            # what goes on to the end of the chunk has part in the gradient of every row's decay
            onward += tl.sum(wide_k * k_sum, 1)
            carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        q_sum = tl.dot(dp, k_tile, q_sum, input_precision=PRECISION)
        k_sum = tl.dot(dp_t, q_tile, k_sum, input_precision=PRECISION)
        inside = (rows < live)[:, None] & (columns < K)[None, :]
        at = dq + rows[:, None] * dq_stride + columns[None, :]
        tl.store(at, (q_sum + with_itself * wide_k).to(dq.dtype.element_ty), mask=inside)
        of_row += tl.sum(wide_q * q_sum, 1)
        if ERASE != NONE:
            e_sum = -tl.dot(dr, S, input_precision=PRECISION)
            if GATE == SCALAR:
                e_sum *= to_row
            e_sum = tl.dot(dt, k_tile, e_sum, input_precision=PRECISION)
            k_sum = tl.dot(dt_t, k_tile, k_sum, input_precision=PRECISION)
            of_erase += tl.sum(wide_k * e_sum, 1)
        of_row -= tl.sum(wide_k * k_sum, 1)
        k_sum += with_itself * wide_q
        if ERASE != NONE:
            k_sum += gate[:, None] * e_sum
        at = dk + rows[:, None] * dk_stride + columns[None, :]
        tl.store(at, k_sum.to(dk.dtype.element_ty), mask=inside)
    if ERASE != NONE:
        tl.store(d_erase + first_head + rows * HV, of_erase, mask=rows < live)
        of_row += gate * of_erase
    if GATE == SCALAR:
        gradient = tl.cumsum(of_row, 0, reverse=True) + tl.sum(onward, 0)
        gradient += tl.exp2(last.to(tl.float32)) * tl.sum(carried, 0)
        tl.store(dg + first_head + rows * HV, gradient, mask=rows < live)
