"""Scalar gates, kernel 1, one program a chunk and value head: what of a chunk does not depend on the state.

Reads g, erase, write, each one number a token and head, and where something is erased k. Writes the gates chunk by
chunk (in their tensors a head's numbers lie HV apart), G as the running sum of g in the chunk, and the inverse

    A = (I + tril(erase_r exp(G_r - G_c) k_r k_c, -1))^-1

and, where sequences are cut into segments, two bounds as logs to base 2: what is left after the chunk of a state before
it, and to how much erasing may let a part of it grow there, from whichever of its tokens on:

    grown = sum_r log max(1, |1 - erase_r |k_r|^2|)         faded = G_C + grown
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from glade.ops.linear_attention.triton.prepare import unit_lower_inverse
from glade.ops.linear_attention.triton.tiles import (
    NONE,
    SCALAR,
    chunk_tokens,
    load_rows,
    log2_decay,
    pair_decay,
    tile_of_program,
    token_head,
)


@triton.jit
def scalar_prepare_kernel(
    k, g, erase, write,
    k_strides, g_strides, erase_strides, write_strides,
    G, erase_rows, write_rows, A, fading,
    starts, ends, num_tokens, chunks_a_row,
    HV, GROUP, K,
    KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, G_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, head, tile = tile_of_program(tl.program_id(0), HV)
    row, start, live = chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, C, PACKED)
    rows = tl.arange(0, C)
    in_chunk = tile * C + rows
    # All is asked for before anything is stored, which a load could not pass: one wait instead of four.
    if GATE == SCALAR:
        g = token_head(g, g_strides, row, start, head)
        logs = tl.load(g + rows * g_strides[1], mask=rows < live, other=0.0)
    if WRITE == SCALAR:
        write = token_head(write, write_strides, row, start, head)
        written = tl.load(write + rows * write_strides[1], mask=rows < live, other=0.0)
    if ERASE != NONE:
        erase = token_head(erase, erase_strides, row, start, head)
        gate = tl.load(erase + rows * erase_strides[1], mask=rows < live, other=0.0).to(tl.float32)
        k = token_head(k, k_strides, row, start, head // GROUP)
        lower = tl.zeros([C, C], tl.float32)
        for block in tl.static_range(0, KP // BK):
            columns = block * BK + tl.arange(0, BK)
            k_tile = load_rows(k, k_strides, rows, live, columns, K).to(DTYPE)
            lower = tl.dot(k_tile, tl.trans(k_tile), lower, input_precision=PRECISION)
    if GATE == SCALAR:
        logs = log2_decay(logs, G_TYPE)
        sums = tl.cumsum(logs, 0)
        tl.store(G + in_chunk, sums)
        faded, grown = tl.sum(logs, 0).to(tl.float32), 0.0
    if WRITE == SCALAR:
        tl.store(write_rows + in_chunk, written.to(tl.float32))
    if ERASE != NONE:
        tl.store(erase_rows + in_chunk, gate)
        lower *= gate[:, None]
        if fading is not None:
            erased = tl.sum(tl.where(rows[:, None] == rows[None, :], lower, 0.0), 1)
            grown = tl.sum(tl.log2(tl.maximum(tl.abs(1 - erased), 1.0)), 0)
            faded += grown
        if GATE == SCALAR:
            lower *= pair_decay(sums, C)
        lower = tl.where(rows[:, None] > rows[None, :], lower, 0.0)
        square = rows[:, None] * C + rows[None, :]
        inverse = unit_lower_inverse(lower, C, LEVELS, DTYPE, PRECISION)
        tl.store(A + tile * C * C + square, inverse.to(DTYPE))
    if fading is not None:
        tl.store(fading + tile * 2, faded)
        tl.store(fading + tile * 2 + 1, grown)
