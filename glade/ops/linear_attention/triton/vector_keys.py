"""Vector gates, kernel 5, one program a chunk, value head and block of key channels: gradients of q, k, erase and g.

From the state before the chunk, S, and the gradient of the one after it, dS:

    dq = scale exp(G) do S^T      de = -exp(G) dR^ S^T      dk' = exp(G_C - G) R dS^T

and from the pairs of the chunk, by the levels of `prepare.py` with each level's factors x and e = erase k:
dq += x (dP_l (x k)), de += x (dT_l (x k)) and dk' += x (dP_l^T (x q) + dT_l^T (x e)).
Then dk = dk' + erase de, d_erase = k de, and per channel

    dg_r = sum_{i >= r} (q dq + e de - k dk')_i + sum_i (exp(G_C - G) k R dS^T)_i + exp(G_C) rowsum(S dS).

Pairs within sixteen rows are products of batches [sixteens, channels, 16] by [sixteens, 16, 16], those between the two
sixteens of a chunk of 32 one product more, whose side in memory is masked as it is read.

Decays are made from g again: sums of logs are products with zeros and ones. rowsum(S dS) is the diagonal of a product,
whose sides are at hand for other products; a given state's part that S as it is kept does not hold comes as `carried`.
Without erase and `write`, R is v. The gradient of a scalar erase is written for each block of channels.
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
    log2_decay,
    split_logs,
    to_anchor,
    token_head,
)


@triton.jit
def in_sixteens(x, BK: tl.constexpr, C: tl.constexpr):
    """[channels, tokens] as [sixteens, channels, 16]."""
    return tl.permute(tl.reshape(x, [BK, C // 16, 16]), [1, 0, 2])


@triton.jit
def sum_of_logs(logs, rest_of_logs, which, PRECISION: tl.constexpr):
    """The sum of those logs [..., channels, tokens] whose row in `which` [..., tokens, tokens] says so."""
    which = tl.where(which, 1.0, 0.0).to(logs.dtype)
    return tl.dot(rest_of_logs, which, tl.dot(logs, which, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def add_pairs(
    q_sum, e_sum, k_sum, q, e, k, x, d_products, d_products_T, d_lower, d_lower_T,
    ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What pairs add to dq, de and dk': x their tokens' decay to the anchor between them, d_products and d_lower theirs
    of dP and dT [later, earlier], also transposed."""
    xk, xq = (k.to(tl.float32) * x).to(k.dtype), (q.to(tl.float32) * x).to(k.dtype)
    q_sum += x * tl.dot(xk, d_products_T, input_precision=PRECISION)
    to_k = tl.dot(xq, d_products, input_precision=PRECISION)
    if ERASE != NONE:
        xe = (e.to(tl.float32) * x).to(k.dtype)
        e_sum += x * tl.dot(xk, d_lower_T, input_precision=PRECISION)
        to_k = tl.dot(xe, d_lower, to_k, input_precision=PRECISION)
    k_sum += x * to_k
    return q_sum, e_sum, k_sum


@triton.jit
def vector_keys_kernel(
    q, k, g, erase, q_strides, k_strides, g_strides, erase_strides,
    decay, do, R, R_strides, dR, S_before, dS_after, dP, dT, carried,
    dq, dk, d_erase, dg,
    starts, ends, num_tokens, chunks_a_row, num_token_heads, scale,
    HV, GROUP, K, V, dq_stride, dk_stride,
    KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NUM_CARRIED: tl.constexpr,
    C: tl.constexpr,
    ERASE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, G_TYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(C <= 32)
    NUM_BLOCKS: tl.constexpr = KP // BK
    block, m, head = tl.program_id(0) % NUM_BLOCKS, tl.program_id(0) // NUM_BLOCKS, tl.program_id(1)
    row, start, live = chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    tile = m.to(tl.int64) * HV + head
    rows, columns = tl.arange(0, C), block * BK + tl.arange(0, BK)
    q = token_head(q, q_strides, row, start, head // GROUP)
    k = token_head(k, k_strides, row, start, head // GROUP)
    g = token_head(g, g_strides, row, start, head)
    R = token_head(R, R_strides, row, start, head)
    first_token = row.to(tl.int64) * num_tokens + start
    first_head = first_token * HV + head
    do += first_head * V
    S_before += tile * KP * VP
    dS_after += tile * KP * VP
    dP += tile * C * C
    dq += first_token * dq_stride + head * K
    dk += first_token * dk_stride + head * K
    dg += first_head * K
    if ERASE != NONE:
        erase = token_head(erase, erase_strides, row, start, head)
        dR += first_head * V
        dT += tile * C * C
    if ERASE == VECTOR:
        d_erase += first_head * K
    elif ERASE == SCALAR:
        d_erase += block.to(tl.int64) * num_token_heads + first_head

    # All that is needed after the loop is asked for before it: one wait instead of two.
    q_tile = load_columns(q, q_strides, rows, live, columns, K).to(DTYPE)
    k_tile = load_columns(k, k_strides, rows, live, columns, K).to(DTYPE)
    logs = load_columns(g, g_strides, rows, live, columns, K)
    if ERASE == VECTOR:
        gate = load_columns(erase, erase_strides, rows, live, columns, K)
    elif ERASE == SCALAR:
        gate = tl.load(erase + rows * erase_strides[1], mask=rows < live, other=0.0)
    sixteens, in_sixteen = tl.arange(0, C // 16)[:, None, None], tl.arange(0, 16)
    later, earlier = in_sixteen[None, :, None], in_sixteen[None, None, :]
    diagonal = sixteens * (16 * C + 16)
    d_products = tl.load(dP + diagonal + later * C + earlier)
    d_products_T = tl.load(dP + diagonal + earlier * C + later)
    with_itself = tl.load(dP + diagonal + earlier * (C + 1))
    d_lower, d_lower_T = d_products, d_products_T
    if ERASE != NONE:
        d_lower = tl.load(dT + diagonal + later * C + earlier)
        d_lower_T = tl.load(dT + diagonal + earlier * C + later)
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
        S, dS = tl.load(S_before + state_at), tl.load(dS_after + state_at)
        q_sum = tl.dot(S, d_out, q_sum, input_precision=PRECISION)
        if ERASE != NONE:
            e_sum = tl.dot(S, tl.load(dR + at, mask=inside, other=0.0), e_sum, input_precision=PRECISION)
        r = load_columns(R, R_strides, rows, live, values, V).to(DTYPE)
        k_sum = tl.dot(dS, r, k_sum, input_precision=PRECISION)
        S_dS = tl.dot(S, tl.trans(dS), S_dS, input_precision=PRECISION)

    logs = log2_decay(logs, G_TYPE)
    if tl.float64 == G_TYPE:
        sums = tl.cumsum(logs, 1)
    logs, rest_of_logs = split_logs(logs, DTYPE)
    if tl.float32 == G_TYPE:
        sums = sum_of_logs(logs, rest_of_logs, rows[:, None] <= rows[None, :], PRECISION)
    over_chunk = tl.sum(tl.where(rows[None, :] == C - 1, sums, 0.0), 1)[:, None]
    to_border = tl.sum(tl.where(rows[None, :] == 16, sums, 0.0), 1)[:, None]
    e_tile = k_tile  # without erase nothing reads it
    if ERASE == VECTOR:
        e_tile = (gate.to(tl.float32) * k_tile.to(tl.float32)).to(DTYPE)
    elif ERASE == SCALAR:
        e_tile = (gate.to(tl.float32)[None, :] * k_tile.to(tl.float32)).to(DTYPE)
    to_row = tl.exp2(tl.minimum(sums, 0.0).to(tl.float32))
    q_sum *= to_row * scale
    k_sum *= tl.exp2(tl.minimum(over_chunk - sums, 0.0).to(tl.float32))
    # what goes on to the end of the chunk has part in the gradient of every row's decay
    channel = tl.arange(0, BK)
    onward += tl.sum(tl.where(channel[:, None] == channel[None, :], S_dS, 0.0), 1)
    onward = onward * tl.load(decay + tile * KP + columns) + tl.sum(k_tile.to(tl.float32) * k_sum, 1)
    if ERASE != NONE:
        e_sum *= -to_row
    if C == 32:
        square, between = rows[:, None] * C + rows[None, :], (rows >= 16)[:, None] & (rows < 16)[None, :]
        across = tl.load(dP + square, mask=between, other=0.0)
        across_lower = across
        if ERASE != NONE:
            across_lower = tl.load(dT + square, mask=between, other=0.0)
        q_sum, e_sum, k_sum = add_pairs(
            q_sum, e_sum, k_sum, q_tile, e_tile, k_tile, tl.exp2(-tl.abs(sums - to_border).to(tl.float32)),
            across, tl.trans(across), across_lower, tl.trans(across_lower), ERASE, PRECISION,
        )  # fmt: skip

    q_near, e_near, k_near = in_sixteens(q_sum, BK, C), in_sixteens(e_sum, BK, C), in_sixteens(k_sum, BK, C)
    q_tile, e_tile, k_tile = in_sixteens(q_tile, BK, C), in_sixteens(e_tile, BK, C), in_sixteens(k_tile, BK, C)
    logs, rest_of_logs = in_sixteens(logs, BK, C), in_sixteens(rest_of_logs, BK, C)
    for level in tl.range(0, 4, num_stages=1):
        which = tl.broadcast_to(to_anchor(earlier, later, level), [C // 16, 16, 16])
        x = tl.exp2(tl.minimum(sum_of_logs(logs, rest_of_logs, which, PRECISION), 0.0))
        pairs, pairs_T = level_pairs(later, earlier, level), level_pairs(earlier, later, level)
        q_near, e_near, k_near = add_pairs(
            q_near, e_near, k_near, q_tile, e_tile, k_tile, x,
            tl.where(pairs, d_products, 0.0), tl.where(pairs_T, d_products_T, 0.0),
            tl.where(pairs, d_lower, 0.0), tl.where(pairs_T, d_lower_T, 0.0), ERASE, PRECISION,
        )  # fmt: skip

    # the diagonal pairs, which do not decay, are not in these sums yet
    wide_q, wide_k = q_tile.to(tl.float32), k_tile.to(tl.float32)
    per_row = wide_q * q_near - wide_k * k_near
    tokens = sixteens * 16 + earlier
    channels = columns[None, :, None]
    inside = (channels < K) & (tokens < live)
    if ERASE == VECTOR:
        wide_gate = in_sixteens(gate, BK, C).to(tl.float32)
    elif ERASE == SCALAR:
        wide_gate = tl.reshape(gate, [C // 16, 1, 16]).to(tl.float32)
    if ERASE != NONE:
        per_row += wide_gate * wide_k * e_near
    # The sum from each row on, as products with zeros and ones: a scan would pass numbers from thread to thread.
    from_here = tl.broadcast_to(tl.where(later >= earlier, 1.0, 0.0).to(DTYPE), [C // 16, 16, 16])
    high, rest = split_logs(per_row, DTYPE)
    gradient = tl.dot(rest, from_here, input_precision=PRECISION) + onward[None, :, None]
    gradient = tl.dot(high, from_here, gradient, input_precision=PRECISION)
    if C == 32:
        second = tl.sum(tl.sum(tl.where(sixteens == 1, per_row, 0.0), 2), 0)
        gradient += tl.where(sixteens == 0, second[None, :, None], 0.0)
    tl.store(dg + channels + tokens * (HV * K), gradient.to(dg.dtype.element_ty), mask=inside)
    with_itself = with_itself.to(tl.float32)
    at_q = dq + channels + tokens * dq_stride
    tl.store(at_q, (q_near + with_itself * wide_k).to(dq.dtype.element_ty), mask=inside)
    k_near += with_itself * wide_q
    if ERASE != NONE:
        k_near += wide_gate * e_near
        if ERASE == VECTOR:
            at = d_erase + channels + tokens * (HV * K)
            tl.store(at, (wide_k * e_near).to(d_erase.dtype.element_ty), mask=inside)
        else:
            at = d_erase + (sixteens * 16 + earlier) * HV
            of_row = tl.expand_dims(tl.sum(wide_k * e_near, 1), 1)
            tl.store(at, of_row, mask=tokens < live)
    at_k = dk + channels + tokens * dk_stride
    tl.store(at_k, k_near.to(dk.dtype.element_ty), mask=inside)
