"""Kernel 4, one program a chunk and value head: gradients of v and write, and of the pair products of a span of chunks.

dP = scale tril(do R^T)      dT = -tril(dR^ R^T, -1)      dv = write dR^      d_write = v dR^

A pair stands on both sides of the diagonal of dP and dT, so that who reads them has their transpose, too. A program
makes the pairs whose later token is in its chunk: do, R and dR^ do not depend on chunks.

Where nothing is erased and `write` is none, R is v and dv is written already (`states.py`): dP is all there is to do.
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
    load_gate,
    load_rows,
    tile_of_program,
    token_head,
)


@triton.jit
def store_pairs(at, pairs, part, C: tl.constexpr, SPAN: tl.constexpr):
    """Pairs of a chunk's tokens, the rows, with each other and, second, with the chunk before: on both sides of the
    diagonal of the span's."""
    rows = tl.arange(0, C)
    one, other = rows[:, None], rows[None, :]
    if SPAN == 2:
        pairs, far = tl.split(tl.permute(tl.reshape(pairs, [C, 2, C]), [0, 2, 1]))
        second = tl.broadcast_to(part > 0, [C, C])
        tl.store(at + (C + one) * (2 * C) + other, far, mask=second)
        tl.store(at + one * (2 * C) + C + other, tl.trans(far), mask=second)
    at += part * (SPAN * C + 1) * C
    tl.store(at + one * (SPAN * C) + other, tl.where(one >= other, pairs, tl.trans(pairs)))


@triton.jit
def values_backward_kernel(
    v, write, v_strides, write_strides,
    do, R, R_strides, dR, dv, d_write, dP, dT,
    starts, ends, num_tokens, chunks_a_row, scale,
    HV, V, dv_stride,
    VP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
    ERASE: tl.constexpr, WRITE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % SPAN
    m, head, tile = tile_of_program(tl.program_id(0) // SPAN, HV)
    tl.static_assert(SPAN <= 2)
    SIZE: tl.constexpr = C * SPAN
    row, start, live = chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, SIZE, PACKED)
    if PACKED and live <= 0:  # a chunk that is not used
        return
    rows = part * C + tl.arange(0, C)
    first_token = row.to(tl.int64) * num_tokens + start
    first_head = first_token * HV + head
    do += first_head * V
    R = token_head(R, R_strides, row, start, head)
    dP += tile * SIZE * SIZE
    if ERASE != NONE:
        dT += tile * SIZE * SIZE
    if ERASE != NONE or WRITE != NONE:
        dR += first_head * V
        dv += first_token * dv_stride + head * V
    if WRITE != NONE:
        v = token_head(v, v_strides, row, start, head)
        write = token_head(write, write_strides, row, start, head)
    if WRITE == VECTOR:
        d_write += first_head * V
    elif WRITE == SCALAR:
        d_write += first_head
    # its own chunk first, then the one before
    others = (part * C + tl.arange(0, SIZE)) % SIZE
    up_to_here = tl.minimum(live, (part + 1) * C)
    d_products = tl.zeros([C, SIZE], tl.float32)
    d_lower = tl.zeros([C, SIZE], tl.float32)
    d_write_sum = tl.zeros([C], tl.float32)
    for first in tl.range(0, VP, BV, num_stages=STAGES):
        columns = first + tl.arange(0, BV)
        inside = (rows < live)[:, None] & (columns < V)[None, :]
        at = rows[:, None] * (HV * V) + columns[None, :]
        d_out = tl.load(do + at, mask=inside, other=0.0).to(DTYPE)
        r_transposed = tl.trans(load_rows(R, R_strides, others, up_to_here, columns, V).to(DTYPE))
        d_products = tl.dot(d_out, r_transposed, d_products, input_precision=PRECISION)
        if ERASE != NONE or WRITE != NONE:
            dr = tl.load(dR + at, mask=inside, other=0.0)
            if ERASE != NONE:
                d_lower = tl.dot(dr, r_transposed, d_lower, input_precision=PRECISION)
            dr = dr.to(tl.float32)
            if WRITE != NONE:
                v_tile = load_rows(v, v_strides, rows, live, columns, V).to(tl.float32)
                if WRITE == VECTOR:
                    tl.store(d_write + at, (v_tile * dr).to(d_write.dtype.element_ty), mask=inside)
                else:
                    d_write_sum += tl.sum(v_tile * dr, 1)
                dr = dr * load_gate(write, write_strides, rows, live, columns, V, WRITE)
            tl.store(dv + columns[None, :] + rows[:, None] * dv_stride, dr.to(dv.dtype.element_ty), mask=inside)
    if WRITE == SCALAR:
        tl.store(d_write + rows * HV, d_write_sum.to(d_write.dtype.element_ty), mask=rows < live)
    store_pairs(dP, (d_products * scale).to(DTYPE), part, C, SPAN)
    if ERASE != NONE:
        store_pairs(dT, (-d_lower).to(DTYPE), part, C, SPAN)
