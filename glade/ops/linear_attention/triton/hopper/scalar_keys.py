"""The gradients of q, k, erase and g of `triton/scalar_keys.py` for sm_90: its equations, a program a span and head.

A warp copies do, R and dR^, and then states and keys for BK key channels at a time, while four compute.
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
    BY_COLUMNS,
    COPYING_REGISTERS,
    COPYING_WARPS,
    all_stages_for,
    barriers,
    bytes_of,
    left_of,
    square_of,
    sums_of,
    wait_until_empty,
    wait_until_full,
)


@gluon.jit
def copy_span(values, to_values, blocks, to_blocks, full_values, full, empty, span, HV, head, of_keys, K):
    """The copying warp: do, R, dR^, then S, dS, k and q by blocks of key channels. Without erase R is v; there is no
    dR^."""
    C: gl.constexpr = blocks[2].block_type.shape[0]
    V: gl.constexpr = blocks[0].block_type.shape[0]
    BK: gl.constexpr = blocks[0].block_type.shape[1]
    OF_VALUES: gl.constexpr = bytes_of(values)
    OF_BLOCK: gl.constexpr = bytes_of(blocks)
    tile = span * HV + head
    barrier = full_values.index(0)
    mbarrier.expect(barrier, OF_VALUES)
    tma.async_copy_global_to_shared(values[0], [span * C, head * V], barrier, to_values[0].index(0))
    if len(values) == 3:
        tma.async_copy_global_to_shared(values[1], [tile * C, 0], barrier, to_values[1].index(0))
        tma.async_copy_global_to_shared(values[2], [tile * C, 0], barrier, to_values[2].index(0))
    else:
        tma.async_copy_global_to_shared(values[1], [span * C, head * V], barrier, to_values[1].index(0))
    for i in range(K // BK):
        stage = wait_until_empty(empty, i)
        barrier = full.index(stage)
        mbarrier.expect(barrier, OF_BLOCK)
        for state in gl.static_range(2):
            place = [(tile * (K // BK) + i) * V, 0]
            tma.async_copy_global_to_shared(blocks[state], place, barrier, to_blocks[state].index(stage))
        for key in gl.static_range(2, 4):
            place = [span * C, of_keys + i * BK]
            tma.async_copy_global_to_shared(blocks[key], place, barrier, to_blocks[key].index(stage))


@gluon.jit
def load_rows(rows, at, token, HV, HALF: gl.constexpr):
    """What is kept of the tokens of a span's two chunks; `at` the first one's."""
    return gl.load(rows + at + gl.where(token < HALF, token, token + (HV - 1) * HALF))


@gluon.jit
def load_sums(G, at, token, HV, HALF: gl.constexpr):
    """Sums of logs from the span's first token on."""
    border = gl.load(G + at + HALF - 1)
    return load_rows(G, at, token, HV, HALF) + gl.where(token < HALF, 0.0, border)


@gluon.jit
def compute_keys(
    to_values, to_blocks, lower, full_values, full, empty, G, erase_rows, dq, dk, d_erase, dg,
    span, HV, head, scale, K, dq_stride, dk_stride, GATE: gl.constexpr, ERASE: gl.constexpr,
):  # fmt: skip
    do, r = to_values[0].index(0), to_values[1].index(0)
    if ERASE:
        dr = to_values[2].index(0)
    S_buffer, dS_buffer, k_buffer, q_buffer = to_blocks
    C: gl.constexpr = k_buffer.shape[1]
    BK: gl.constexpr = k_buffer.shape[2]
    V: gl.constexpr = S_buffer.shape[1]
    HALF: gl.constexpr = C // 2
    PAIRS: gl.constexpr = sums_of(C)  # [later, earlier]
    KEYS: gl.constexpr = sums_of(BK)  # [tokens, key channels]
    OF_TOKENS: gl.constexpr = gl.SliceLayout(1, KEYS)
    token = gl.arange(0, C, OF_TOKENS)
    later, earlier = gl.arange(0, C, gl.SliceLayout(1, PAIRS)), gl.arange(0, C, gl.SliceLayout(0, PAIRS))
    below, above = later[:, None] > earlier[None, :], later[:, None] < earlier[None, :]
    at = ((span * 2).to(gl.int64) * HV + head) * HALF
    if ERASE:
        gate, gate_of_pairs = load_rows(erase_rows, at, token, HV, HALF), load_rows(erase_rows, at, later, HV, HALF)
    of_q, of_e = scale, -1.0
    if GATE:
        sums = load_sums(G, at, token, HV, HALF)
        last = gl.min(sums, 0)  # they never rise
        to_end = gl.exp2(last - sums)[:, None]
        of_q, of_e = (gl.exp2(sums) * scale)[:, None], -gl.exp2(sums)[:, None]
        between = load_sums(G, at, later, HV, HALF)[:, None] - load_sums(G, at, earlier, HV, HALF)[None, :]
        decay, decay_turned = gl.exp2(gl.minimum(between, 0.0)), gl.exp2(gl.minimum(-between, 0.0))

    # Products of pairs, as later by earlier token and the other way round: in registers they are the left sides of the
    # next products as they are; there is room for three, and T's transpose is read from shared memory.
    zeros = gl.zeros([C, C], gl.float32, PAIRS)
    mbarrier.wait(full_values.index(0), 0)
    d_products = warpgroup_mma(do, r.permute((1, 0)), zeros, is_async=True)
    d_turned = warpgroup_mma(r, do.permute((1, 0)), zeros, is_async=True)
    if ERASE:
        d_lower = warpgroup_mma(dr, r.permute((1, 0)), zeros, is_async=True)
        d_products, d_turned, d_lower = warpgroup_mma_wait(0, deps=[d_products, d_turned, d_lower])
    else:
        d_products, d_turned = warpgroup_mma_wait(0, deps=[d_products, d_turned])
    with_itself = gl.sum(gl.where(below | above, 0.0, d_products), 1) * scale
    with_itself = gl.convert_layout(with_itself, OF_TOKENS)[:, None]
    if GATE:
        d_products *= decay
        d_turned *= decay_turned
    dp = gl.convert_layout(gl.where(below, d_products * scale, 0.0).to(gl.bfloat16), left_of(KEYS))
    dp_t = gl.convert_layout(gl.where(above, d_turned * scale, 0.0).to(gl.bfloat16), left_of(KEYS))
    if ERASE:
        if GATE:
            d_lower *= decay
        d_lower = gl.where(below, -d_lower, 0.0)
        dt = gl.convert_layout(d_lower.to(gl.bfloat16), left_of(KEYS))
        lower.store((d_lower * gate_of_pairs[:, None]).to(gl.bfloat16))
        fence_async_shared()

    rows = gl.arange(0, C, gl.SliceLayout(1, BY_COLUMNS))[:, None]
    columns = gl.arange(0, BK, gl.SliceLayout(0, BY_COLUMNS))[None, :]
    first_token = (span * C).to(gl.int64)
    to_q = dq + first_token * dq_stride + head * K
    to_k = dk + first_token * dk_stride + head * K
    of_row, of_erase = gl.zeros([C], gl.float32, OF_TOKENS), gl.zeros([C], gl.float32, OF_TOKENS)
    onward = gl.zeros([C], gl.float32, OF_TOKENS)
    carried = gl.zeros([V], gl.float32, gl.SliceLayout(1, BY_COLUMNS))
    none = gl.zeros([C, BK], gl.float32, KEYS)
    for i in range(K // BK):
        stage = wait_until_full(full, i)
        S, dS, k, q = S_buffer.index(stage), dS_buffer.index(stage), k_buffer.index(stage), q_buffer.index(stage)
        q_sum = warpgroup_mma(do, S, none, is_async=True)
        k_sum = warpgroup_mma(r, dS, none, is_async=True)
        if ERASE:
            e_sum = warpgroup_mma(dr, S, none, is_async=True)
        wide_q, wide_k = q.load(KEYS).to(gl.float32), k.load(KEYS).to(gl.float32)
        if GATE:
            carried += gl.sum(S.load(BY_COLUMNS).to(gl.float32) * dS.load(BY_COLUMNS).to(gl.float32), 1)
        if ERASE:
            q_sum, k_sum, e_sum = warpgroup_mma_wait(0, deps=[q_sum, k_sum, e_sum])
            e_sum *= of_e
        else:
            q_sum, k_sum = warpgroup_mma_wait(0, deps=[q_sum, k_sum])
        q_sum *= of_q
        if GATE:
            k_sum *= to_end
            # what goes on to the end of the span has part in the gradient of every row's decay
            onward += gl.sum(wide_k * k_sum, 1)
        q_sum = warpgroup_mma(dp, k, q_sum, is_async=True)
        k_sum = warpgroup_mma(dp_t, q, k_sum, is_async=True)
        if ERASE:
            e_sum = warpgroup_mma(dt, k, e_sum, is_async=True)
            k_sum = warpgroup_mma(lower.permute((1, 0)), k, k_sum, is_async=True)
            q_sum, e_sum, k_sum = warpgroup_mma_wait(0, deps=[q_sum, e_sum, k_sum])
            of_erase += gl.sum(wide_k * e_sum, 1)
        else:
            q_sum, k_sum = warpgroup_mma_wait(0, deps=[q_sum, k_sum])
        mbarrier.arrive(empty.index(stage), count=1)
        if GATE:
            of_row += gl.sum(wide_q * q_sum - wide_k * k_sum, 1)
        q_sum += with_itself * wide_k
        q_sum = gl.convert_layout(q_sum.to(dq.dtype.element_ty), BY_COLUMNS)
        gl.store(to_q + i * BK + rows * dq_stride + columns, q_sum)
        k_sum += with_itself * wide_q
        if ERASE:
            k_sum += gate[:, None] * e_sum
        k_sum = gl.convert_layout(k_sum.to(dk.dtype.element_ty), BY_COLUMNS)
        gl.store(to_k + i * BK + rows * dk_stride + columns, k_sum)
    if ERASE:
        gl.store(d_erase + first_token * HV + head + token * HV, of_erase.to(d_erase.dtype.element_ty))
        of_row += gate * of_erase
    if GATE:
        of_row = gl.convert_layout(of_row, gl.SliceLayout(0, PAIRS))[None, :]
        gradient = gl.sum(gl.where(below, 0.0, of_row), 1)  # the sum from each row on
        gradient += gl.sum(onward, 0) + gl.exp2(last) * gl.sum(carried, 0)
        gl.store(dg + first_token * HV + head + later * HV, gradient.to(dg.dtype.element_ty))


@gluon.jit
def hopper_scalar_keys_kernel(
    do, R, dR, S, dS, k, q, G, erase_rows, dq, dk, d_erase, dg, scale,
    HV, GROUP, K, dq_stride, dk_stride, GATE: gl.constexpr, ERASE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    span, head = gl.program_id(0) // HV, gl.program_id(0) % HV
    values, blocks = (do, R), (S, dS, k, q)
    if ERASE:
        values += (dR,)
    to_values, to_blocks = all_stages_for(values, 1), all_stages_for(blocks, STAGES)
    lower = square_of(k.block_type.shape[0])
    full_values, _ = barriers(1)
    full, empty = barriers(STAGES)
    gl.warp_specialize(
        [
            (compute_keys, (
                to_values, to_blocks, lower, full_values, full, empty, G, erase_rows, dq, dk, d_erase, dg,
                span, HV, head, scale, K, dq_stride, dk_stride, GATE, ERASE,
            )),
            (copy_span, (
                values, to_values, blocks, to_blocks, full_values, full, empty, span, HV, head, head // GROUP * K, K,
            )),
        ],
        [COPYING_WARPS], [COPYING_REGISTERS],
    )  # fmt: skip
