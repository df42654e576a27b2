"""The passes over states of `triton/scalar_states.py` for sm_90: its equations, its forms in memory.

Products of pairs are made while those of the state are under way, and o of a chunk is stored in the next one's trip,
where it is waited for by nobody.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    mma_v2,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from glade.ops.linear_attention.triton.hopper.pipeline import (
    BY_VALUES,
    BY_WIDE_VALUES,
    COPYING_REGISTERS,
    COPYING_WARPS,
    all_stages_for,
    barriers,
    buffer_for,
    copy_chunks,
    left_of,
    load_row,
    load_turned,
    place_of_program,
    square_of,
    state_at,
    sums_of,
    tokens_at,
    wait_until_full,
)


@gluon.jit
def chunk_decays(G, stage, SUMS: gl.constexpr):
    """exp(G) and exp(G_C - G) of a chunk's tokens, and exp(G_C)."""
    sums = load_row(G, stage, SUMS)
    last = gl.min(sums, 0)  # they never rise
    return gl.exp2(sums), gl.exp2(last - sums), gl.exp2(last)


@gluon.jit
def in_blocks(S, BK: gl.constexpr):
    """[values, keys] as states are kept: by blocks of BK key channels."""
    return gl.permute(gl.reshape(S, [S.shape[0], S.shape[1] // BK, BK]), (1, 0, 2))


@gluon.jit
def compute_forward(
    to_tokens, to_chunks, pairs_buffer, out_buffer, r_buffer, S_buffer, full, empty,
    o, initial, final, R, S_before, P,
    first, end, first_span, sequence_head, HV, head, block, scale, K, V,
    BK: gl.constexpr, SPAN: gl.constexpr, GATE: gl.constexpr, WRITE: gl.constexpr, ERASE: gl.constexpr,
    KEEP: gl.constexpr,
):  # fmt: skip
    q, k, v = to_tokens
    G: gl.constexpr = 0  # of `to_chunks`, where there are
    write: gl.constexpr = GATE
    erase: gl.constexpr = GATE + WRITE
    A: gl.constexpr = GATE + WRITE + 1
    C: gl.constexpr = v.shape[1]
    BV: gl.constexpr = v.shape[2]
    SUMS: gl.constexpr = sums_of(C)
    STATE: gl.constexpr = sums_of(K)
    PAIRS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, 2], [16, 8])  # [earlier, later]
    earlier = gl.arange(0, C, gl.SliceLayout(1, PAIRS))[:, None]
    later = gl.arange(0, C, gl.SliceLayout(0, PAIRS))[None, :]
    of_values = head * V + block * BV
    at = state_at(sequence_head, block, K, V, BV)
    S = gl.zeros([BV, K], gl.float32, STATE)
    if initial is not None:
        S = gl.convert_layout(gl.load(initial + at), STATE)
    zeros = gl.zeros([BV, C], gl.float32, SUMS)
    out_before = gl.zeros([BV, C], gl.bfloat16, SUMS)
    for step in range(end - first):
        m = first + step
        stage = wait_until_full(full, step)
        q_tile, k_tile = q.index(stage), k.index(stage)
        S_low = S.to(gl.bfloat16)
        left = gl.convert_layout(S_low, left_of(SUMS))
        if ERASE:
            erased = warpgroup_mma(left, k_tile.permute((1, 0)), zeros, is_async=True)
        out = warpgroup_mma(left, q_tile.permute((1, 0)), zeros, is_async=True)

        k_left = k_tile.load(gl.DotOperandLayout(0, PAIRS, 2))
        q_right = q_tile.permute((1, 0)).load(gl.DotOperandLayout(1, PAIRS, 2))
        pairs = mma_v2(k_left, q_right, gl.zeros([C, C], gl.float32, PAIRS)) * scale
        if GATE:
            sums = to_chunks[G].index(stage).reshape([C])
            of_later, of_earlier = sums.load(gl.SliceLayout(0, PAIRS)), sums.load(gl.SliceLayout(1, PAIRS))
            pairs *= gl.exp2(gl.minimum(of_later[None, :] - of_earlier[:, None], 0.0))
        pairs = gl.where(later >= earlier, pairs, 0.0).to(gl.bfloat16)
        tma.store_wait(0)  # what was stored in the trip before has left shared memory
        out_buffer.permute((1, 0)).store(out_before)
        pairs_buffer.store(pairs)
        if KEEP and step % SPAN == 0:
            S_buffer.store(in_blocks(S_low, BK))
        z = load_turned(v, stage, SUMS)
        if WRITE:
            z *= load_row(to_chunks[write], stage, SUMS)[None, :]
        if GATE:
            to_row, to_end, decay = chunk_decays(to_chunks[G], stage, SUMS)
        if ERASE:
            of_erased = load_row(to_chunks[erase], stage, SUMS)
            if GATE:
                of_erased *= to_row
            erased, out = warpgroup_mma_wait(0, deps=[erased, out])
            left = gl.convert_layout((z - of_erased[None, :] * erased).to(gl.bfloat16), left_of(SUMS))
            z = warpgroup_mma(left, to_chunks[A].index(stage).permute((1, 0)), zeros)
        else:
            out = warpgroup_mma_wait(0, deps=[out])
        r = z.to(gl.bfloat16)
        at_end = r
        if GATE:
            out *= (to_row * scale)[None, :]
            S *= decay
            at_end = (z * to_end[None, :]).to(gl.bfloat16)
        else:
            out *= scale
        if R is not None:
            r_buffer.permute((1, 0)).store(r)
        fence_async_shared()
        out = warpgroup_mma(gl.convert_layout(r, left_of(SUMS)), pairs_buffer, out, is_async=True)
        S = warpgroup_mma(gl.convert_layout(at_end, left_of(STATE)), k_tile, S, is_async=True)
        if step > 0:
            tma.async_copy_shared_to_global(o, [(m - 1) * C, of_values], out_buffer)
        if KEEP:
            span = (first_span + step // SPAN) * HV + head
            if R is not None:
                tma.async_copy_shared_to_global(R, [(span * SPAN + step % SPAN) * C, block * BV], r_buffer)
            if block == 0:
                tma.async_copy_shared_to_global(P, [(m * HV + head) * C, 0], pairs_buffer)
            if step % SPAN == 0:
                tma.async_copy_shared_to_global(S_before, [span * (K // BK), block * BV, 0], S_buffer)
        out, S = warpgroup_mma_wait(0, deps=[out, S])
        mbarrier.arrive(empty.index(stage), count=1)
        out_before = out.to(gl.bfloat16)
    tma.store_wait(0)
    out_buffer.permute((1, 0)).store(out_before)
    fence_async_shared()
    tma.async_copy_shared_to_global(o, [(end - 1) * C, of_values], out_buffer)
    if final is not None:
        gl.store(final + at, gl.convert_layout(S, BY_WIDE_VALUES))
    tma.store_wait(0)


@gluon.jit
def hopper_scalar_forward_kernel(
    q, k, v, A, G, erase, write,
    o, initial, final, R, S_before, P,
    a_row, a_sequence, spans_a_row, spans_a_sequence, scale,
    HV, GROUP, K, V,
    BK: gl.constexpr, SPAN: gl.constexpr, GATE: gl.constexpr, WRITE: gl.constexpr, ERASE: gl.constexpr,
    KEEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = v.block_type.shape[0]
    BV: gl.constexpr = v.block_type.shape[1]
    sequence_head, head, block, first, end, first_span = place_of_program(
        HV, a_row, a_sequence, spans_a_row, spans_a_sequence, V // BV
    )
    by_tokens, by_chunks = (q, k, v), ()
    columns = (head // GROUP * K, head // GROUP * K, head * V + block * BV)
    if GATE:
        by_chunks += (G,)
    if WRITE:
        by_chunks += (write,)
    if ERASE:
        by_chunks += (erase, A)
    to_tokens, to_chunks = all_stages_for(by_tokens, STAGES), all_stages_for(by_chunks, STAGES)
    pairs_buffer, out_buffer, r_buffer, S_buffer = square_of(C), buffer_for(o), None, None
    if KEEP:
        S_buffer = buffer_for(S_before)
    if R is not None:
        r_buffer = buffer_for(R)
    full, empty = barriers(STAGES)
    gl.warp_specialize(
        [
            (compute_forward, (
                to_tokens, to_chunks, pairs_buffer, out_buffer, r_buffer, S_buffer, full, empty,
                o, initial, final, R, S_before, P,
                first, end, first_span, sequence_head, HV, head, block, scale, K, V,
                BK, SPAN, GATE, WRITE, ERASE, KEEP,
            )),
            (copy_chunks, (
                by_tokens, columns, to_tokens, by_chunks, to_chunks, full, empty, first, end, HV, head, C, False,
            )),
        ],
        [COPYING_WARPS], [COPYING_REGISTERS],
    )  # fmt: skip


@gluon.jit
def compute_backward(
    to_tokens, to_chunks, dS_buffer, full, empty,
    d_final, d_initial, dv, d_write, dR, dS_after,
    first, end, first_span, sequence_head, HV, head, block, num_token_heads, scale, K, V, dv_stride,
    BK: gl.constexpr, SPAN: gl.constexpr, GATE: gl.constexpr, WRITE: gl.constexpr, ERASE: gl.constexpr,
):  # fmt: skip
    q, k, do = to_tokens[0], to_tokens[1], to_tokens[2]  # and v, where there is a write
    P = to_chunks[0]
    G: gl.constexpr = 1  # of `to_chunks`, where there are
    write: gl.constexpr = 1 + GATE
    erase: gl.constexpr = 1 + GATE + WRITE
    A: gl.constexpr = 2 + GATE + WRITE
    C: gl.constexpr = do.shape[1]
    BV: gl.constexpr = do.shape[2]
    SUMS: gl.constexpr = sums_of(C)
    STATE: gl.constexpr = sums_of(K)
    SIXTEENS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    sixteen = gl.arange(0, BV // 16, gl.SliceLayout(1, SIXTEENS))[:, None]
    token = gl.arange(0, C, gl.SliceLayout(0, SIXTEENS))[None, :]
    of_r, of_v = tokens_at(V, BV, C), tokens_at(dv_stride, BV, C)
    at = state_at(sequence_head, block, K, V, BV)
    dS = gl.zeros([BV, K], gl.float32, STATE)
    if d_final is not None:
        dS = gl.convert_layout(gl.load(d_final + at), STATE)
    zeros = gl.zeros([BV, C], gl.float32, SUMS)
    for step in range(end - first):
        m = end - 1 - step
        stage = wait_until_full(full, step)
        q_tile, k_tile, do_tile = q.index(stage), k.index(stage), do.index(stage)
        dS_low = dS.to(gl.bfloat16)
        z = warpgroup_mma(gl.convert_layout(dS_low, left_of(SUMS)), k_tile.permute((1, 0)), zeros, is_async=True)
        span = (first_span + (m - first) // SPAN) * HV + head
        if (m - first) % SPAN == SPAN - 1:
            tma.store_wait(0)  # the one before has left shared memory
            dS_buffer.store(in_blocks(dS_low, BK))
            fence_async_shared()
            tma.async_copy_shared_to_global(dS_after, [span * (K // BK), block * BV, 0], dS_buffer)
        d_out = load_turned(do, stage, SUMS)
        if ERASE:
            of_erased = load_row(to_chunks[erase], stage, SUMS)
        if GATE:
            to_row, to_end, decay = chunk_decays(to_chunks[G], stage, SUMS)
            d_out *= (to_row * scale)[None, :]
            if ERASE:
                of_erased *= to_row
            dS *= decay
        else:
            d_out *= scale
        if WRITE:
            v_tile = load_turned(to_tokens[3], stage, SUMS)

        z = warpgroup_mma_wait(0, deps=[z])
        if GATE:
            z *= to_end[None, :]
        z = warpgroup_mma(do_tile.permute((1, 0)), P.index(stage).permute((1, 0)), z, is_async=True)
        dS = warpgroup_mma(gl.convert_layout(d_out.to(gl.bfloat16), left_of(STATE)), q_tile, dS, is_async=True)
        z = warpgroup_mma_wait(1, deps=[z])
        if ERASE:
            left = gl.convert_layout(z.to(gl.bfloat16), left_of(SUMS))
            z = warpgroup_mma(left, to_chunks[A].index(stage), zeros, is_async=True)
            z, dS = warpgroup_mma_wait(0, deps=[z, dS])
            left = gl.convert_layout((z * -of_erased[None, :]).to(gl.bfloat16), left_of(STATE))
            dS = warpgroup_mma(left, k_tile, dS, is_async=True)
            to_r = dR + (span * SPAN + (m - first) % SPAN).to(gl.int64) * (C * V) + block * BV
            gl.store(to_r + of_r, gl.convert_layout(z.to(gl.bfloat16), BY_VALUES))
        first_token = (m * C).to(gl.int64)
        if WRITE:
            # by sixteens, which a warp holds: nothing passes from warp to warp
            of_parts = gl.sum(gl.reshape(z * v_tile, [BV // 16, 16, C]), 1)
            to_part = d_write + (block * (BV // 16) + sixteen).to(gl.int64) * num_token_heads + first_token * HV + head
            gl.store(to_part + token * HV, gl.convert_layout(of_parts, SIXTEENS))
            z *= load_row(to_chunks[write], stage, SUMS)[None, :]
        to_v = dv + first_token * dv_stride + head * V + block * BV
        gl.store(to_v + of_v, gl.convert_layout(z.to(gl.bfloat16), BY_VALUES))
        dS = warpgroup_mma_wait(0, deps=[dS])
        mbarrier.arrive(empty.index(stage), count=1)
    if d_initial is not None:
        gl.store(d_initial + at, gl.convert_layout(dS, BY_WIDE_VALUES))
    tma.store_wait(0)


@gluon.jit
def hopper_scalar_backward_kernel(
    q, k, v, do, A, P, G, erase, write,
    d_final, d_initial, dv, d_write, dR, dS_after,
    a_row, a_sequence, spans_a_row, spans_a_sequence, num_token_heads, scale,
    HV, GROUP, K, V, dv_stride,
    BK: gl.constexpr, SPAN: gl.constexpr, GATE: gl.constexpr, WRITE: gl.constexpr, ERASE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = do.block_type.shape[0]
    BV: gl.constexpr = do.block_type.shape[1]
    sequence_head, head, block, first, end, first_span = place_of_program(
        HV, a_row, a_sequence, spans_a_row, spans_a_sequence, V // BV
    )
    by_tokens, by_chunks = (q, k, do), (P,)
    columns = (head // GROUP * K, head // GROUP * K, head * V + block * BV)
    if GATE:
        by_chunks += (G,)
    if WRITE:
        by_chunks += (write,)
        by_tokens += (v,)
        columns += (head * V + block * BV,)
    if ERASE:
        by_chunks += (erase, A)
    to_tokens, to_chunks = all_stages_for(by_tokens, STAGES), all_stages_for(by_chunks, STAGES)
    dS_buffer = buffer_for(dS_after)
    full, empty = barriers(STAGES)
    gl.warp_specialize(
        [
            (compute_backward, (
                to_tokens, to_chunks, dS_buffer, full, empty,
                d_final, d_initial, dv, d_write, dR, dS_after,
                first, end, first_span, sequence_head, HV, head, block, num_token_heads, scale, K, V, dv_stride,
                BK, SPAN, GATE, WRITE, ERASE,
            )),
            (copy_chunks, (
                by_tokens, columns, to_tokens, by_chunks, to_chunks, full, empty, first, end, HV, head, C, True,
            )),
        ],
        [COPYING_WARPS], [COPYING_REGISTERS],
    )  # fmt: skip
