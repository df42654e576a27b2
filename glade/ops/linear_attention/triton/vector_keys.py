"""Vector gates, kernel 5, one program a span of chunks, value head and block of key channels: gradients of q, k, erase
and g.

From the state before the span, S, and the gradient of the one after it, dS, with G summed from the span's first token:

    dq = scale exp(G) do S^T      de = -exp(G) dR^ S^T      dk' = exp(G_C - G) R dS^T

and from the pairs of the span, by levels as in `prepare.py`, with each level's factors x and e = erase k:
dq += x (dP_l (x k)), de += x (dT_l (x k)) and dk' += x (dP_l^T (x q) + dT_l^T (x e)).
Then dk = dk' + erase de, d_erase = k de, and per channel

    dg_r = sum_{i >= r} (q dq + e de - k dk')_i + sum_i (exp(G_C - G) k R dS^T)_i + exp(G_C) rowsum(S dS).

Pairs within sixteen tokens are products of batches [sixteens, channels, 16] by [sixteens, 16, 16]; those of two
sixteens by [sixteens, 16 or 32, 16], the tokens of the other half of their block beside each sixteen. At a level a
token is either the later or the earlier one of all its pairs: it shows x q and x e to the others, or x k, and takes dq
and de, or dk'. So one product, with dP on both sides of its diagonal, does both. Between sixteens x reaches to the end
of the earlier half, so that every exponent is a sum of logs.

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
    log2_decay,
    split_logs,
    tile_of_program,
    to_anchor,
    token_head,
)

# The columns of a tile [channels, tokens] are the tokens in an order in which the warps of a product [32, 64] hold
# sixteen of them each, so that nothing moves between the two forms.


@triton.jit
def tokens_of_columns(C: tl.constexpr):
    column = tl.arange(0, C)
    return column // 8 % (C // 16) * 16 + column // (C // 2) * 8 + column % 8


@triton.jit
def load_values(
    x, stride, tiles, m, head, rows, live, values, first, V, VP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """[value channels, tokens in the order of `tokens_of_columns`], of a span that begins at x or, where there is a
    descriptor of `tokens_in_order`, of span m."""
    if tiles is None:
        inside = (values < V)[:, None] & (rows < live)[None, :]
        tile = tl.load(x + values[:, None] + rows[None, :] * stride, mask=inside, other=0.0)
    else:
        tile = tl.trans(tl.reshape(tiles.load([m, 0, 0, 0, head * VP + first]), [C, BV]))
    return tile


@triton.jit
def in_sixteens(x, BK: tl.constexpr, C: tl.constexpr):
    """[channels, tokens] as [sixteens, channels, 16]."""
    return tl.reshape(tl.permute(tl.reshape(x, [BK, 2, C // 16, 8]), [2, 0, 1, 3]), [C // 16, BK, 16])


@triton.jit
def of_sixteens(totals, which):
    """[sixteens, channels]: the sums of those `totals` [others, channels] that `which` [others, sixteens] tells."""
    return tl.sum(tl.where(which[:, :, None], totals[:, None, :], 0.0), 0)


@triton.jit
def load_sixteens(x, strides, tokens, live, channels, K):
    """`load_columns` in sixteens: [sixteens, channels, 16]."""
    return tl.load(x + tokens * strides[1] + channels * strides[3], mask=(channels < K) & (tokens < live), other=0.0)


@triton.jit
def sum_of_logs(logs, rest_of_logs, which, PRECISION: tl.constexpr):
    """The sum of those logs [..., channels, tokens] whose row in `which` [..., tokens, tokens] says so."""
    which = tl.where(which, 1.0, 0.0).to(logs.dtype)
    return tl.dot(rest_of_logs, which, tl.dot(logs, which, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def load_far_pairs(x, level: tl.constexpr, C: tl.constexpr):
    """[sixteens, 16 * 2 ** level, 16]: each sixteen's pairs with the tokens that it parts from at the level."""
    sixteens, rows = tl.arange(0, C // 16)[:, None, None], tl.arange(0, 16 << level)[None, :, None]
    others = (((sixteens >> level) ^ 1) << level) * 16
    return tl.load(x + (others + rows) * C + sixteens * 16 + tl.arange(0, 16)[None, None, :])


@triton.jit
def of_other_half(x, level: tl.constexpr, BK: tl.constexpr, C: tl.constexpr):
    """[sixteens, channels, 16 * 2 ** level], from [sixteens, channels, 16]: the tokens that each sixteen parts from."""
    HALF: tl.constexpr = 1 << level
    BLOCKS: tl.constexpr = C // (32 * HALF)
    early, late = tl.split(tl.permute(tl.reshape(x, [BLOCKS, 2, HALF, BK, 16]), [0, 3, 2, 4, 1]))
    early = tl.reshape(early, [BLOCKS, 1, BK, HALF * 16])
    late = tl.reshape(late, [BLOCKS, 1, BK, HALF * 16])
    # `tl.join` would do, but Triton 3.6 takes operands behind one for halves of what they are
    other = tl.where(tl.arange(0, 2 * HALF)[None, :, None, None] < HALF, late, early)
    return tl.reshape(other, [C // 16, BK, HALF * 16])


@triton.jit
def times_pairs(tile, d_pairs, level: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """The others of `tile` by pairs [sixteens, others, 16]: of tokens of a sixteen (level -1), or of a level beyond."""
    tile = tile.to(d_pairs.dtype)
    if level >= 0:
        tile = of_other_half(tile, level, BK, C)
    return tl.dot(tile, d_pairs, input_precision=PRECISION)


@triton.jit
def add_pairs(
    q_sum, e_sum, k_sum, q, e, k, x_late, x_early, d_products, d_lower,
    level: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the pairs of a level add to dq, de and dk': x_late decays from the border between them to the tokens behind
    it, x_early those of the others to it, zero elsewhere; d_products and d_lower dP and dT of these pairs."""
    xk = k * x_early
    from_others = times_pairs(q * x_late + xk, d_products, level, BK, C, PRECISION)
    q_sum += x_late * from_others
    if ERASE != NONE:
        of_lower = times_pairs(e * x_late + xk, d_lower, level, BK, C, PRECISION)
        e_sum += x_late * of_lower
        from_others += of_lower
    k_sum += x_early * from_others
    return q_sum, e_sum, k_sum


@triton.jit
def vector_keys_kernel(
    q, k, g, erase, q_strides, k_strides, g_strides, erase_strides,
    S_tiles, dS_tiles, do_tiles, R_tiles, dR_tiles, do, R, R_strides, dR, S_before, dS_after, dP, dT, carried,
    dq, dk, d_erase, dg,
    starts, ends, num_tokens, chunks_a_row, num_token_heads, scale,
    HV, GROUP, K, V, dq_stride, dk_stride,
    KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NUM_CARRIED: tl.constexpr,
    C: tl.constexpr,
    ERASE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, G_TYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tl.static_assert((C <= 64) & (BK <= 32))  # of 64 channels products are `wgmma`, whose sums no loop may carry
    N: tl.constexpr = C // 16
    NUM_BLOCKS: tl.constexpr = KP // BK
    block = tl.program_id(0) % NUM_BLOCKS
    m, head, tile = tile_of_program(tl.program_id(0) // NUM_BLOCKS, HV)
    row, start, live = chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    if PACKED and live <= 0:  # a chunk that is not used
        return
    rows, columns = tokens_of_columns(C), block * BK + tl.arange(0, BK)
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
    sixteens, in_sixteen = tl.arange(0, N)[:, None, None], tl.arange(0, 16)
    others, row_in_sixteen = in_sixteen[None, :, None], in_sixteen[None, None, :]
    tokens, channels = sixteens * 16 + row_in_sixteen, columns[None, :, None]
    q_tile = load_sixteens(q, q_strides, tokens, live, channels, K).to(DTYPE)
    k_tile = load_sixteens(k, k_strides, tokens, live, channels, K).to(DTYPE)
    logs = load_sixteens(g, g_strides, tokens, live, channels, K)
    if ERASE == VECTOR:
        gate = load_sixteens(erase, erase_strides, tokens, live, channels, K)
    elif ERASE == SCALAR:
        gate = tl.load(erase + tokens * erase_strides[1], mask=tokens < live, other=0.0)
    near = sixteens * (16 * C + 16) + others * C + row_in_sixteen
    d_products = tl.load(dP + near)
    with_itself = tl.load(dP + tokens * (C + 1))
    d_lower = d_products  # without erase nothing reads it
    if ERASE != NONE:
        d_lower = tl.load(dT + near)
    far_products, far_lower = (), ()
    for level in tl.static_range(0, N // 2):  # one level for two sixteens, two for four
        far_products += (load_far_pairs(dP, level, C),)
        if ERASE != NONE:
            far_lower += (load_far_pairs(dT, level, C),)
    if ERASE == NONE:
        far_lower = far_products
    onward = tl.zeros([BK], tl.float32)
    for i in tl.static_range(0, NUM_CARRIED):
        onward += tl.load(carried + (tile * NUM_CARRIED + i) * KP + columns)

    # Tiles are channels by rows: the registers that hold a product are then the left side of the next one as they are.
    q_sum = tl.zeros([BK, C], tl.float32)
    e_sum = tl.zeros([BK, C], tl.float32)
    k_sum = tl.zeros([BK, C], tl.float32)
    S_dS = tl.zeros([BK, BK], tl.float32)
    for first_v in tl.range(0, VP, BV, num_stages=STAGES):
        values = first_v + tl.arange(0, BV)
        d_out = load_values(do, HV * V, do_tiles, m, head, rows, live, values, first_v, V, VP, C, BV).to(DTYPE)
        if S_tiles is None:
            state_at = columns[:, None] * VP + values[None, :]
            S, dS = tl.load(S_before + state_at), tl.load(dS_after + state_at)
        else:
            state_row = (m * HV + head) * KP + block * BK
            S, dS = S_tiles.load([state_row, first_v]), dS_tiles.load([state_row, first_v])
        # first, so that Triton lays the others' warps along tokens
        S_dS = tl.dot(S, tl.trans(dS), S_dS, input_precision=PRECISION)
        q_sum = tl.dot(S, d_out, q_sum, input_precision=PRECISION)
        if ERASE != NONE:
            dr = load_values(dR, HV * V, dR_tiles, m, head, rows, live, values, first_v, V, VP, C, BV)
            e_sum = tl.dot(S, dr, e_sum, input_precision=PRECISION)
        r = load_values(R, R_strides[1], R_tiles, m, head, rows, live, values, first_v, V, VP, C, BV).to(DTYPE)
        k_sum = tl.dot(dS, r, k_sum, input_precision=PRECISION)

    # The unit matrix times them: a product's registers, transposed, are the right side of another; these are symmetric.
    unit = tl.broadcast_to(tl.where(others == row_in_sixteen, 1.0, 0.0).to(DTYPE), [N, 16, 16])
    d_products = tl.dot(unit, d_products, input_precision=PRECISION)
    if ERASE != NONE:
        d_lower = tl.dot(unit, d_lower, input_precision=PRECISION)
    # Sums of logs: up to a token from the beginning of its sixteen, behind it to the end, and over whole sixteens.
    logs = log2_decay(logs, G_TYPE)
    if tl.float64 == G_TYPE:
        up_to = tl.cumsum(logs, 2)
    logs, rest_of_logs = split_logs(logs, DTYPE)
    if tl.float32 == G_TYPE:
        which = tl.broadcast_to(others <= row_in_sixteen, [N, 16, 16])
        up_to = sum_of_logs(logs, rest_of_logs, which, PRECISION)
    totals = tl.min(up_to, 2)  # the last ones
    wide_q, wide_k = q_tile.to(tl.float32), k_tile.to(tl.float32)
    wide_e = wide_k  # without erase nothing reads it
    if ERASE != NONE:
        wide_gate = gate.to(tl.float32)
        wide_e = wide_gate * wide_k
    other, one = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    to_row = tl.exp2((up_to + of_sixteens(totals, other < one)[:, :, None]).to(tl.float32))
    q_near = in_sixteens(q_sum, BK, C) * to_row * scale
    to_end = tl.exp2(((totals + of_sixteens(totals, other > one))[:, :, None] - up_to).to(tl.float32))
    k_near = in_sixteens(k_sum, BK, C) * to_end
    e_near = q_near  # without erase nothing reads it
    if ERASE != NONE:
        e_near = in_sixteens(e_sum, BK, C) * -to_row
    # what goes on to the end of the span has part in the gradient of every row's decay
    channel = tl.arange(0, BK)
    onward += tl.sum(tl.where(channel[:, None] == channel[None, :], S_dS, 0.0), 1)
    onward = onward * tl.exp2(tl.sum(totals, 0).to(tl.float32))
    onward += tl.sum(tl.sum(wide_k * k_near, 2), 0)

    for level in tl.range(0, 4, num_stages=1):
        which = tl.broadcast_to(to_anchor(row_in_sixteen, others, level), [N, 16, 16])
        # In bf16 the logs' rest is left out: 2^-s for a sum s of them is off by s 2^-s 2^-9 ln 2, 7e-4 at most, where
        # its own rounding is 2e-3. (Not so below, where such a sum is taken from another.)
        if tl.bfloat16 == DTYPE:
            x = tl.exp2(tl.dot(logs, tl.where(which, 1.0, 0.0).to(logs.dtype), input_precision=PRECISION))
        else:
            x = tl.exp2(sum_of_logs(logs, rest_of_logs, which, PRECISION))
        late = ((row_in_sixteen >> level) & 1) == 1
        part = ((row_in_sixteen ^ others) >> level) == 1
        q_near, e_near, k_near = add_pairs(
            q_near, e_near, k_near, wide_q, wide_e, wide_k, tl.where(late, x, 0.0), tl.where(late, 0.0, x),
            tl.trans(tl.where(part, d_products, 0.0).to(DTYPE), 0, 2, 1),
            tl.trans(tl.where(part, d_lower, 0.0).to(DTYPE), 0, 2, 1), -1, BK, C, ERASE, PRECISION,
        )  # fmt: skip
    # Made again where that is a product: up_to would stand in registers through the loop.
    behind = totals[:, :, None] - up_to
    if tl.float32 == G_TYPE:
        behind = sum_of_logs(logs, rest_of_logs, tl.broadcast_to(others > row_in_sixteen, [N, 16, 16]), PRECISION)
    from_start = tl.exp2((totals[:, :, None] - behind).to(tl.float32))
    to_border = tl.exp2(behind.to(tl.float32))
    for level in tl.static_range(0, N // 2):
        late = ((one >> level) & 1) == 1
        between = tl.full([N, BK], 1.0, tl.float32)
        if level > 0:
            inside = (other >> level == one >> level) & (late == (other < one)) & (other != one)
            between = tl.exp2(of_sixteens(totals, inside).to(tl.float32))
        late = tl.trans(late)
        q_near, e_near, k_near = add_pairs(
            q_near, e_near, k_near, wide_q, wide_e, wide_k,
            from_start * tl.where(late, between, 0.0)[:, :, None], to_border * tl.where(late, 0.0, between)[:, :, None],
            far_products[level], far_lower[level], level, BK, C, ERASE, PRECISION,
        )  # fmt: skip

    # the diagonal pairs, which do not decay, are not in these sums yet
    per_row = wide_q * q_near - wide_k * k_near
    if ERASE != NONE:
        per_row += wide_e * e_near
    inside = (channels < K) & (tokens < live)
    # The sum from each row on, as products with zeros and ones: a scan would pass numbers from thread to thread.
    from_here = tl.broadcast_to(tl.where(others >= row_in_sixteen, 1.0, 0.0).to(DTYPE), [N, 16, 16])
    high, rest = split_logs(per_row, DTYPE)
    gradient = tl.dot(rest, from_here, input_precision=PRECISION) + onward[None, :, None]
    gradient = tl.dot(high, from_here, gradient, input_precision=PRECISION)
    if N > 1:
        gradient += of_sixteens(tl.sum(per_row, 2), other > one)[:, :, None]
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
            at = d_erase + tokens * HV
            of_row = tl.expand_dims(tl.sum(wide_k * e_near, 1), 1)
            tl.store(at, of_row, mask=tokens < live)
    at_k = dk + channels + tokens * dk_stride
    tl.store(at_k, k_near.to(dk.dtype.element_ty), mask=inside)
