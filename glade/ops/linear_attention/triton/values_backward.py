"""Kernel 4, one program a chunk and value head: gradients of v and write, and of the chunk's pair products.

dP = scale tril(do R^T)      dT = -tril(dR^ R^T, -1)      dv = write dR^      d_write = v dR^

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
    token_head,
)


@triton.jit
def values_backward_kernel(
    v, write, v_strides, write_strides,
    do, R, R_strides, dR, dv, d_write, dP, dT,
    starts, ends, num_tokens, chunks_a_row, scale,
    HV, V, dv_stride,
    VP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ERASE: tl.constexpr, WRITE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m, head = tl.program_id(0), tl.program_id(1)
    row, start, live = chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    tile = m.to(tl.int64) * HV + head
    rows = tl.arange(0, C)
    first_token = row.to(tl.int64) * num_tokens + start
    first_head = first_token * HV + head
    do += first_head * V
    R = token_head(R, R_strides, row, start, head)
    dP += tile * C * C
    if ERASE != NONE:
        dT += tile * C * C
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
    d_products = tl.zeros([C, C], tl.float32)
    d_lower = tl.zeros([C, C], tl.float32)
    d_write_sum = tl.zeros([C], tl.float32)
    for first in tl.range(0, VP, BV, num_stages=STAGES):
        columns = first + tl.arange(0, BV)
        inside = (rows < live)[:, None] & (columns < V)[None, :]
        at = rows[:, None] * (HV * V) + columns[None, :]
        d_out = tl.load(do + at, mask=inside, other=0.0).to(DTYPE)
        r_transposed = tl.trans(load_rows(R, R_strides, rows, live, columns, V).to(DTYPE))
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
    square = rows[:, None] * C + rows[None, :]
    not_after = rows[:, None] >= rows[None, :]
    tl.store(dP + square, tl.where(not_after, d_products * scale, 0.0).to(DTYPE))
    if ERASE != NONE:
        before = rows[:, None] > rows[None, :]
        tl.store(dT + square, tl.where(before, -d_lower, 0.0).to(DTYPE))
