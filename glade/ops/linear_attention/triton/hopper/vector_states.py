"""The passes over states of `triton/states.py` for sm_90: its equations, its forms in memory.

All is held as value channels by tokens or by key channels, the transpose of what stands there: S, z, R and their
gradients are then the left sides of their products, from registers, and what was prepared the right ones, as it lies.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
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
    state_at,
    sums_of,
    tokens_at,
    wait_until_full,
)
from glade.ops.linear_attention.triton.tiles import SCALAR, VECTOR


@gluon.jit
def compute_forward(
    to_tokens, to_chunks, out_buffer, r_buffer, S_buffer, full, empty,
    o, initial, final, R, S_before,
    first, end, first_span, sequence_head, HV, head, block, K, V,
    SPAN: gl.constexpr, ERASE: gl.constexpr, WRITE: gl.constexpr,
):  # fmt: skip
    v = to_tokens[0]  # and write, where it is a vector
    # and Eg and A, where there is an erase, and write, where it is scalar
    Qg, Kt, decay, P = to_chunks[0], to_chunks[1], to_chunks[2], to_chunks[3]
    C: gl.constexpr = P.shape[1]
    BV: gl.constexpr = v.shape[2]
    SUMS: gl.constexpr = sums_of(C)
    STATE: gl.constexpr = sums_of(K)
    of_values = head * V + block * BV
    at = state_at(sequence_head, block, K, V, BV)
    S = gl.zeros([BV, K], gl.float32, STATE)
    if initial is not None:
        S = gl.convert_layout(gl.load(initial + at), STATE)
    zeros = gl.zeros([BV, C], gl.float32, SUMS)
    out_before = gl.zeros([BV, C], gl.bfloat16, SUMS)  # o of a chunk is stored in the next one's trip
    for step in range(end - first):
        m = first + step
        stage = wait_until_full(full, step)
        S_low = S.to(gl.bfloat16)
        left = gl.convert_layout(S_low, left_of(SUMS))
        if ERASE:
            erased = warpgroup_mma(left, to_chunks[4].index(stage).permute((1, 0)), zeros, is_async=True)
        out = warpgroup_mma(left, Qg.index(stage).permute((1, 0)), zeros, is_async=True)
        tma.store_wait(0)  # what was stored in the trip before has left shared memory
        out_buffer.permute((1, 0)).store(out_before)
        if S_before is not None and step % SPAN == 0:
            S_buffer.permute((1, 0)).store(S_low)
        S *= load_row(decay, stage, STATE)[None, :]
        z = load_turned(v, stage, SUMS)
        if WRITE == SCALAR:
            z *= load_row(to_chunks[6 if ERASE else 4], stage, SUMS)[None, :]
        elif WRITE == VECTOR:
            z *= load_turned(to_tokens[1], stage, SUMS)
        if ERASE:
            erased = warpgroup_mma_wait(1, deps=[erased])
            left = gl.convert_layout((z - erased).to(gl.bfloat16), left_of(SUMS))
            z = warpgroup_mma(left, to_chunks[5].index(stage).permute((1, 0)), zeros, is_async=True)
            z, out = warpgroup_mma_wait(0, deps=[z, out])
        r = z.to(gl.bfloat16)
        out = warpgroup_mma(gl.convert_layout(r, left_of(SUMS)), P.index(stage).permute((1, 0)), out, is_async=True)
        S = warpgroup_mma(gl.convert_layout(r, left_of(STATE)), Kt.index(stage), S, is_async=True)
        if R is not None:
            r_buffer.permute((1, 0)).store(r)
        fence_async_shared()
        if step > 0:
            tma.async_copy_shared_to_global(o, [(m - 1) * C, of_values], out_buffer)
        if R is not None:
            tma.async_copy_shared_to_global(R, [m * C, of_values], r_buffer)
        if S_before is not None and step % SPAN == 0:
            span = (first_span + step // SPAN) * HV + head
            tma.async_copy_shared_to_global(S_before, [span * K, block * BV], S_buffer)
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
def hopper_vector_forward_kernel(
    v, write, Qg, Eg, Kt, decay, P, A,
    o, initial, final, R, S_before,
    a_row, a_sequence, spans_a_row, spans_a_sequence,
    HV, K, V,
    SPAN: gl.constexpr, ERASE: gl.constexpr, WRITE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = P.block_type.shape[0]
    BV: gl.constexpr = v.block_type.shape[1]
    sequence_head, head, block, first, end, first_span = place_of_program(
        HV, a_row, a_sequence, spans_a_row, spans_a_sequence, V // BV
    )
    by_tokens, by_chunks = (v,), (Qg, Kt, decay, P)
    columns = (head * V + block * BV,)
    if ERASE:
        by_chunks += (Eg, A)
    if WRITE == SCALAR:
        by_chunks += (write,)
    elif WRITE == VECTOR:
        by_tokens += (write,)
        columns += (head * V + block * BV,)
    to_tokens, to_chunks = all_stages_for(by_tokens, STAGES), all_stages_for(by_chunks, STAGES)
    out_buffer, r_buffer, S_buffer = buffer_for(o), None, None
    if R is not None:
        r_buffer = buffer_for(R)
    if S_before is not None:
        S_buffer = buffer_for(S_before)
    full, empty = barriers(STAGES)
    gl.warp_specialize(
        [
            (compute_forward, (
                to_tokens, to_chunks, out_buffer, r_buffer, S_buffer, full, empty,
                o, initial, final, R, S_before,
                first, end, first_span, sequence_head, HV, head, block, K, V,
                SPAN, ERASE, WRITE,
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
    d_final, dR, dS_after,
    first, end, first_span, sequence_head, HV, head, block, K, V, dR_stride,
    SPAN: gl.constexpr, ERASE: gl.constexpr,
):  # fmt: skip
    do = to_tokens[0]
    # and Eg and A, where there is an erase
    Qg, Kt, decay, P = to_chunks[0], to_chunks[1], to_chunks[2], to_chunks[3]
    C: gl.constexpr = P.shape[1]
    BV: gl.constexpr = do.shape[2]
    SUMS: gl.constexpr = sums_of(C)
    STATE: gl.constexpr = sums_of(K)
    of_r = tokens_at(dR_stride, BV, C)
    dS = gl.zeros([BV, K], gl.float32, STATE)
    if d_final is not None:
        dS = gl.convert_layout(gl.load(d_final + state_at(sequence_head, block, K, V, BV)), STATE)
    zeros = gl.zeros([BV, C], gl.float32, SUMS)
    for step in range(end - first):
        m = end - 1 - step
        stage = wait_until_full(full, step)
        d_out = do.index(stage).permute((1, 0))
        dS_low = dS.to(gl.bfloat16)
        left = gl.convert_layout(dS_low, left_of(SUMS))
        z = warpgroup_mma(left, Kt.index(stage).permute((1, 0)), zeros, is_async=True)
        z = warpgroup_mma(d_out, P.index(stage), z, is_async=True)
        dS *= load_row(decay, stage, STATE)[None, :]
        dS = warpgroup_mma(d_out, Qg.index(stage), dS, is_async=True)
        if (m - first) % SPAN == SPAN - 1:
            tma.store_wait(0)  # the one before has left shared memory
            dS_buffer.permute((1, 0)).store(dS_low)
            fence_async_shared()
            span = (first_span + (m - first) // SPAN) * HV + head
            tma.async_copy_shared_to_global(dS_after, [span * K, block * BV], dS_buffer)
        z = warpgroup_mma_wait(1, deps=[z])
        if ERASE:
            left = gl.convert_layout(z.to(gl.bfloat16), left_of(SUMS))
            z = warpgroup_mma(left, to_chunks[5].index(stage), zeros, is_async=True)
            z, dS = warpgroup_mma_wait(0, deps=[z, dS])
            left = gl.convert_layout((-z).to(gl.bfloat16), left_of(STATE))
            dS = warpgroup_mma(left, to_chunks[4].index(stage), dS, is_async=True)
        to_r = dR + (m * C).to(gl.int64) * dR_stride + head * V + block * BV
        gl.store(to_r + of_r, gl.convert_layout(z.to(gl.bfloat16), BY_VALUES))
        dS = warpgroup_mma_wait(0, deps=[dS])
        mbarrier.arrive(empty.index(stage), count=1)
    tma.store_wait(0)


@gluon.jit
def hopper_vector_backward_kernel(
    do, Qg, Eg, Kt, decay, P, A,
    d_final, dR, dS_after,
    a_row, a_sequence, spans_a_row, spans_a_sequence,
    HV, K, V, dR_stride,
    SPAN: gl.constexpr, ERASE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = P.block_type.shape[0]
    BV: gl.constexpr = do.block_type.shape[1]
    sequence_head, head, block, first, end, first_span = place_of_program(
        HV, a_row, a_sequence, spans_a_row, spans_a_sequence, V // BV
    )
    by_tokens, by_chunks = (do,), (Qg, Kt, decay, P)
    columns = (head * V + block * BV,)
    if ERASE:
        by_chunks += (Eg, A)
    to_tokens, to_chunks = all_stages_for(by_tokens, STAGES), all_stages_for(by_chunks, STAGES)
    dS_buffer = buffer_for(dS_after)
    full, empty = barriers(STAGES)
    gl.warp_specialize(
        [
            (compute_backward, (
                to_tokens, to_chunks, dS_buffer, full, empty,
                d_final, dR, dS_after,
                first, end, first_span, sequence_head, HV, head, block, K, V, dR_stride,
                SPAN, ERASE,
            )),
            (copy_chunks, (
                by_tokens, columns, to_tokens, by_chunks, to_chunks, full, empty, first, end, HV, head, C, True,
            )),
        ],
        [COPYING_WARPS], [COPYING_REGISTERS],
    )  # fmt: skip
