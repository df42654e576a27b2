"""Kernel 1, one program a chunk and value head: everything of a chunk that does not depend on the state.

Reads q, k, g, erase and a scalar `write`. Writes the pre-gated Qg = scale exp(G) q, Eg = exp(G) erase k and
Kt = exp(G_C - G) k, the chunk's decay exp(G_C), the products P = tril(Qg Kb^T) and the inverse
A = (I + tril(Eg Kb^T, -1))^-1, where Kb = exp(-G) k is never formed; and a scalar `write` chunk by chunk, in words that
the pass forwards can copy ahead.

With a vector gate the products are made by levels: a pair of rows belongs to the one level where the row lies in the
later and the column in the earlier half of the same block. Both are gated against the first row of that later half
(the anchor), by exponents that are never positive. Pairs within sixteen rows are batches of products of sixteen rows,
masked, for all blocks of a level; those between the two sixteens of a chunk of 32 are one product. The inverse follows
the same levels: with X the inverse of the diagonal blocks and T_l the pairs of a level, the inverse of
the blocks of twice the size is X - X T_l X.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from glade.ops.linear_attention.triton.cache import discard
from glade.ops.linear_attention.triton.tiles import (
    NONE,
    SCALAR,
    VECTOR,
    anchors,
    chunk_tokens,
    level_pairs,
    load_gate,
    load_rows,
    log2_decay,
    pair_decay,
    tile_of_program,
    token_head,
)


@triton.jit
def in_sixteens(x, C: tl.constexpr, BK: tl.constexpr):
    """[tokens, channels] as [sixteens, 16, channels]."""
    return tl.reshape(x, [C // 16, 16, BK])


@triton.jit
def of_a_chunk(within, between, C: tl.constexpr):
    """[C, C] from the blocks on its diagonal, [sixteens, 16, 16], and what lies below them in [C, C]."""
    S: tl.constexpr = C // 16
    sixteen = tl.arange(0, S)
    within = tl.broadcast_to(tl.expand_dims(within, 2), [S, 16, S, 16])
    rows, columns = sixteen[:, None, None, None], sixteen[None, None, :, None]
    below = tl.where(rows > columns, tl.reshape(between, [S, 16, S, 16]), 0.0)
    return tl.reshape(tl.where(rows == columns, within, below), [C, C])


@triton.jit
def on_the_diagonal(x, C: tl.constexpr):
    """[sixteens, 16, 16], the blocks on the diagonal of [C, C]."""
    S: tl.constexpr = C // 16
    sixteen = tl.arange(0, S)
    same = sixteen[:, None, None, None] == sixteen[None, None, :, None]
    return tl.sum(tl.where(same, tl.reshape(x, [S, 16, S, 16]), 0.0), 2)


@triton.jit
def with_pairs(X, lower, rows, columns, level: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """X - X T X: the inverse of blocks of twice the size, from X, that of the blocks, and T, the pairs of the level."""
    pairs = tl.where(level_pairs(rows, columns, level), lower, 0.0).to(DTYPE)
    blocks = X.to(DTYPE)
    return X - tl.dot(blocks, tl.dot(pairs, blocks, input_precision=PRECISION).to(DTYPE), input_precision=PRECISION)


@triton.jit
def unit_lower_inverse(lower, C: tl.constexpr, LEVELS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 of a strictly lower triangular [C, C], in fp32; levels within sixteen tokens as batches."""
    near = on_the_diagonal(lower, C)
    rows, columns = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    X = tl.where(rows == columns, 1.0, 0.0) - tl.where(level_pairs(rows, columns, 0), near, 0.0)
    for level in tl.static_range(1, 4):
        X = with_pairs(X, near, rows, columns, level, DTYPE, PRECISION)
    X = of_a_chunk(X, tl.zeros([C, C], tl.float32), C)
    rows, columns = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for level in tl.static_range(4, LEVELS):
        X = with_pairs(X, lower, rows, columns, level, DTYPE, PRECISION)
    return X


@triton.jit
def prepare_kernel(
    q, k, g, erase, write,
    q_strides, k_strides, g_strides, erase_strides, write_strides,
    G, Qg, Eg, Kt, decay, P, A, write_rows,
    starts, ends, num_tokens, chunks_a_row, scale,
    HV, GROUP, K,
    KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, G_TYPE: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tl.static_assert((GATE != VECTOR) | (C <= 32))  # of more than two sixteens not all pairs are made here
    m, head, tile = tile_of_program(tl.program_id(0), HV)
    row, start, live = chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    rows = tl.arange(0, C)
    q = token_head(q, q_strides, row, start, head // GROUP)
    k = token_head(k, k_strides, row, start, head // GROUP)
    if ERASE != NONE:
        erase = token_head(erase, erase_strides, row, start, head)
    if GATE != NONE:
        g = token_head(g, g_strides, row, start, head)
    if GATE == SCALAR:
        g_row = tl.load(g + rows * g_strides[1], mask=rows < live, other=0.0)
        sums = tl.cumsum(log2_decay(g_row, G_TYPE), 0)
        tl.store(G + tile * C + rows, sums)
        last = tl.sum(tl.where(rows == C - 1, sums, 0.0), 0)
        tl.store(decay + tile, tl.exp2(last.to(tl.float32)))

    if GATE == VECTOR:
        G += tile * C * KP
        decay += tile * KP
    Qg += tile * C * KP
    Kt += tile * C * KP
    if ERASE != NONE:
        Eg += tile * C * KP
    products = tl.zeros([C, C], tl.float32)
    lower = tl.zeros([C, C], tl.float32)
    near = tl.zeros([C // 16, 16, 16], tl.float32)
    near_lower = tl.zeros([C // 16, 16, 16], tl.float32)
    later, earlier = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    for block in tl.static_range(0, KP // BK):
        columns = block * BK + tl.arange(0, BK)
        q_tile = load_rows(q, q_strides, rows, live, columns, K)
        k_tile = load_rows(k, k_strides, rows, live, columns, K)
        at = rows[:, None] * KP + columns[None, :]
        if ERASE != NONE:
            e_tile = load_gate(erase, erase_strides, rows, live, columns, K, ERASE) * k_tile.to(tl.float32)
        if GATE == VECTOR:
            logs = log2_decay(load_rows(g, g_strides, rows, live, columns, K), G_TYPE)
            sums = tl.cumsum(logs, 0)
            tl.store(G + at, sums)
            # the anchor rows are read back by other threads than wrote them
            tl.debug_barrier()
            last = tl.load(G + (C - 1) * KP + columns)
            tl.store(decay + columns, tl.exp2(last.to(tl.float32)))
            to_row = tl.exp2(sums.to(tl.float32))
            to_end = tl.exp2((last[None, :] - sums).to(tl.float32))
        elif GATE == SCALAR:
            to_row = tl.exp2(sums.to(tl.float32))[:, None]
            to_end = tl.exp2((last - sums).to(tl.float32))[:, None]
        if GATE == NONE:
            tl.store(Qg + at, (q_tile.to(tl.float32) * scale).to(DTYPE))
            tl.store(Kt + at, k_tile.to(DTYPE))
            if ERASE != NONE:
                tl.store(Eg + at, e_tile.to(DTYPE))
        else:
            tl.store(Qg + at, (q_tile.to(tl.float32) * to_row * scale).to(DTYPE))
            tl.store(Kt + at, (k_tile.to(tl.float32) * to_end).to(DTYPE))
            if ERASE != NONE:
                tl.store(Eg + at, (e_tile * to_row).to(DTYPE))

        q_tile, k_tile = q_tile.to(DTYPE), k_tile.to(DTYPE)
        if ERASE != NONE:
            e_tile = e_tile.to(DTYPE)
        if GATE == VECTOR:
            with_itself = in_sixteens(tl.sum(q_tile.to(tl.float32) * k_tile.to(tl.float32), 1)[:, None], C, 1)
            near += tl.where(later == earlier, with_itself, 0.0)
            for level in tl.range(0, 4, num_stages=1):
                anchor_sums = tl.load(G + anchors(rows, level)[:, None] * KP + columns[None, :])
                # times -1 is a sign of the operand; 0 - x would be an instruction
                x = tl.exp2(tl.abs(sums - anchor_sums).to(tl.float32) * -1.0)
                pairs = level_pairs(later, earlier, level)
                k_late = tl.permute(in_sixteens((k_tile.to(tl.float32) * x).to(DTYPE), C, BK), [0, 2, 1])
                q_early = in_sixteens((q_tile.to(tl.float32) * x).to(DTYPE), C, BK)
                near += tl.where(pairs, tl.dot(q_early, k_late, input_precision=PRECISION), 0.0)
                if ERASE != NONE:
                    e_early = in_sixteens((e_tile.to(tl.float32) * x).to(DTYPE), C, BK)
                    near_lower += tl.where(pairs, tl.dot(e_early, k_late, input_precision=PRECISION), 0.0)
            if C == 32:
                border = tl.load(G + 16 * KP + columns)[None, :]
                to_border = tl.exp2(tl.abs(sums - border).to(tl.float32) * -1.0)
                k_far = tl.trans((k_tile.to(tl.float32) * to_border).to(DTYPE))
                q_near = (q_tile.to(tl.float32) * to_border).to(DTYPE)
                products = tl.dot(q_near, k_far, products, input_precision=PRECISION)
                if ERASE != NONE:
                    e_near = (e_tile.to(tl.float32) * to_border).to(DTYPE)
                    lower = tl.dot(e_near, k_far, lower, input_precision=PRECISION)
        else:
            products += tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            if ERASE != NONE:
                lower += tl.dot(e_tile, tl.trans(k_tile), input_precision=PRECISION)

    if GATE == VECTOR:
        if not INTERPRETED:
            discard(G, C * KP * (G_TYPE.primitive_bitwidth // 8))
        # `unit_lower_inverse` cuts near_lower out again: beside lower it would stand in registers (60 bytes spilled)
        products, lower = of_a_chunk(near, products, C), of_a_chunk(near_lower, lower, C)
    else:
        not_after = rows[:, None] >= rows[None, :]
        if GATE == SCALAR:
            between = pair_decay(sums, C)
        else:
            between = tl.where(not_after, 1.0, 0.0)
        products = tl.where(not_after, products * between, 0.0)
        if ERASE != NONE:
            lower = tl.where(rows[:, None] > rows[None, :], lower * between, 0.0)
    square = rows[:, None] * C + rows[None, :]
    tl.store(P + tile * C * C + square, (products * scale).to(DTYPE))
    if WRITE == SCALAR:
        write = token_head(write, write_strides, row, start, head)
        written = tl.load(write + rows * write_strides[1], mask=rows < live, other=0.0)
    if ERASE != NONE:
        inverse = unit_lower_inverse(lower, C, LEVELS, DTYPE, PRECISION)
        tl.store(A + tile * C * C + square, inverse.to(DTYPE))
    if WRITE == SCALAR:  # after all that could wait for it
        tl.store(write_rows + tile * C + rows, written.to(tl.float32))


@triton.jit
def inverse_kernel(A, C: tl.constexpr, LEVELS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """A chunk's A by itself, in place of what it is the inverse of, below the diagonal."""
    rows = tl.arange(0, C)
    A += tl.program_id(0).to(tl.int64) * C * C + rows[:, None] * C + rows[None, :]
    lower = tl.load(A).to(tl.float32)
    tl.store(A, unit_lower_inverse(lower, C, LEVELS, DTYPE, PRECISION).to(DTYPE))
