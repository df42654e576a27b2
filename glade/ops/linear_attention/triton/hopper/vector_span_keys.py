"""The gradients of q, k and g of `triton/vector_keys.py` for sm_90 where nothing is erased: spans of two chunks.

As in `vector_keys.py`, whose matrices these are: each chunk is a half of the span, and pairs of both are a level more,
whose factors are those of the halves' sums.
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
    BY_VALUES,
    BY_WIDE_VALUES,
    COPYING_REGISTERS,
    COPYING_WARPS,
    all_stages_for,
    barriers,
    bytes_of,
    left_of,
    load_turned,
    stages_for,
    sums_of,
    wait_until_empty,
    wait_until_full,
)
from glade.ops.linear_attention.triton.hopper.vector_keys import (
    BEHIND,
    FROM_HERE,
    LEVELS,
    UP_TO,
    in_two_parts,
    store_levels,
    store_ones,
    sum_of,
)
from glade.ops.linear_attention.triton.tiles import LEAST_LOG, LOG2_E


@gluon.jit
def copy_spans(
    pairs, to_pairs, channels, to_channels, values, to_values, states, to_states,
    full_pairs, empty_pairs, full_channels, empty_channels, full_values, empty_values,
    first, end, step, HV, GROUP, K, V,
):  # fmt: skip
    """The copying warp: of a span dP, by halves, then, BK channels at a time, q, k and g of both halves, and do, R, S
    and dS by blocks of value channels."""
    C: gl.constexpr = channels[0].block_type.shape[0]
    BK: gl.constexpr = channels[0].block_type.shape[1]
    BV: gl.constexpr = states[0].block_type.shape[1]
    for tile in range(first, end, step):
        span, head, number = tile // HV, tile % HV, (tile - first) // step
        stage = wait_until_empty(empty_pairs, number)
        barrier = full_pairs.index(stage)
        mbarrier.expect(barrier, 4 * bytes_of((pairs,)))
        for i in gl.static_range(4):
            place = [tile * (2 * C) + i // 2 * C, i % 2 * C]
            tma.async_copy_global_to_shared(pairs, place, barrier, to_pairs.index(i))
        for block in range(K // BK):
            number_of_block = number * (K // BK) + block
            for half in gl.static_range(2):
                stage = wait_until_empty(empty_channels, 2 * number_of_block + half)
                barrier = full_channels.index(stage)
                mbarrier.expect(barrier, bytes_of(channels))
                for i in gl.static_range(len(channels)):
                    place = [(span * 2 + half) * C, (head // GROUP if i < 2 else head) * K + block * BK]
                    tma.async_copy_global_to_shared(channels[i], place, barrier, to_channels[i].index(stage))
            for v in gl.static_range(V // BV):
                stage = wait_until_empty(empty_values, number_of_block * (V // BV) + v)
                barrier = full_values.index(stage)
                mbarrier.expect(barrier, 2 * bytes_of(values) + bytes_of(states))
                for i in gl.static_range(len(states)):
                    place = [tile * K + block * BK, v * BV]
                    tma.async_copy_global_to_shared(states[i], place, barrier, to_states[i].index(stage))
                for i in gl.static_range(len(values)):
                    for half in gl.static_range(2):
                        place = [(span * 2 + half) * C, head * V + v * BV]
                        tma.async_copy_global_to_shared(values[i], place, barrier, to_values[i].index(half))


@gluon.jit
def load_half(to_channels, full_channels, empty_channels, number, SUMS: gl.constexpr):
    """q and k, [channels, tokens], and the logs' two parts, of a half."""
    stage = wait_until_full(full_channels, number)
    q = to_channels[0].index(stage).permute((1, 0)).load(SUMS)
    k = to_channels[1].index(stage).permute((1, 0)).load(SUMS)
    logs = gl.maximum(load_turned(to_channels[2], stage, SUMS) * LOG2_E, LEAST_LOG)
    mbarrier.arrive(empty_channels.index(stage), count=1)
    high, rest = in_two_parts(logs, SUMS)
    return q, k, high, rest


@gluon.jit
def decays_of_half(high, rest, ones, zeros):
    """To each token from the half's beginning, from it to the end, and [channels], over all of the half."""
    up_to, behind = sum_of(high, rest, ones.index(UP_TO), zeros), sum_of(high, rest, ones.index(BEHIND), zeros)
    up_to, behind = warpgroup_mma_wait(0, deps=[up_to, behind])
    return gl.exp2(up_to), gl.exp2(behind), gl.exp2(gl.min(up_to, 1))  # sums never rise


@gluon.jit
def pairs_of_half(
    q_sum, k_sum, q_tile, k_tile, high, ones, by_level, HALF: gl.constexpr, zeros, row, SUMS: gl.constexpr
):
    """The sums with what the pairs within a half add to them."""
    for level in gl.static_range(LEVELS):
        x = gl.exp2(warpgroup_mma(high, ones.index(level), zeros))
        late = (((row >> level) & 1) == 1)[None, :]
        left = (gl.where(late, q_tile.to(gl.float32), k_tile.to(gl.float32)) * x).to(gl.bfloat16)
        of_others = x * warpgroup_mma(
            gl.convert_layout(left, left_of(SUMS)), by_level.index(HALF * LEVELS + level), zeros
        )
        q_sum += gl.where(late, of_others, 0.0)
        k_sum += gl.where(late, 0.0, of_others)
    return q_sum, k_sum


@gluon.jit
def store_half(q_sum, k_sum, q_tile, k_tile, with_itself, to_q, to_k, dq_stride, dk_stride, C: gl.constexpr):
    """The diagonal pairs, which do not decay, come last."""
    q_sum += with_itself[None, :] * k_tile.to(gl.float32)
    k_sum += with_itself[None, :] * q_tile.to(gl.float32)
    channel = gl.arange(0, q_sum.shape[0], gl.SliceLayout(1, BY_VALUES))[:, None]
    token = gl.arange(0, C, gl.SliceLayout(0, BY_VALUES))[None, :]
    q_sum = gl.convert_layout(q_sum.to(to_q.dtype.element_ty), BY_VALUES)
    gl.store(to_q + channel + token * dq_stride, q_sum)
    k_sum = gl.convert_layout(k_sum.to(to_k.dtype.element_ty), BY_VALUES)
    gl.store(to_k + channel + token * dk_stride, k_sum)


@gluon.jit
def compute_keys(
    to_pairs, to_channels, to_values, to_states, ones, by_level,
    full_pairs, empty_pairs, full_channels, empty_channels, full_values, empty_values,
    dq, dk, dg, first, end, step, HV, scale, K, V, dq_stride, dk_stride,
):  # fmt: skip
    do, R = to_values
    C: gl.constexpr = do.shape[1]
    BV: gl.constexpr = do.shape[2]
    BK: gl.constexpr = to_channels[0].shape[2]
    SUMS: gl.constexpr = sums_of(C)  # [channels, tokens]
    other = gl.arange(0, C, gl.SliceLayout(1, BY_COLUMNS))[:, None]
    token = gl.arange(0, C, gl.SliceLayout(0, BY_COLUMNS))[None, :]
    store_ones(ones, other, token)
    zeros = gl.zeros([BK, C], gl.float32, SUMS)
    row = gl.arange(0, C, gl.SliceLayout(0, SUMS))
    wide_channel = gl.arange(0, BK, gl.SliceLayout(1, BY_WIDE_VALUES))[:, None]
    wide_token = gl.arange(0, C, gl.SliceLayout(0, BY_WIDE_VALUES))[None, :]
    for tile in range(first, end, step):
        span, head, number = tile // HV, tile % HV, (tile - first) // step
        wait_until_full(full_pairs, number)
        early, late = to_pairs.index(0).load(BY_COLUMNS), to_pairs.index(3).load(BY_COLUMNS)
        store_levels(by_level, early, other, token, 0)
        store_levels(by_level, late, other, token, LEVELS)
        early = gl.sum(gl.where(other == token, early.to(gl.float32), 0.0), 0)
        late = gl.sum(gl.where(other == token, late.to(gl.float32), 0.0), 0)
        of_early, of_late = gl.convert_layout(early, row.type.layout), gl.convert_layout(late, row.type.layout)
        fence_async_shared()
        first_token = (span * (2 * C)).to(gl.int64)
        for block in range(K // BK):
            number_of_block = number * (K // BK) + block
            q0, k0, high0, rest0 = load_half(to_channels, full_channels, empty_channels, 2 * number_of_block, SUMS)
            q1, k1, high1, rest1 = load_half(to_channels, full_channels, empty_channels, 2 * number_of_block + 1, SUMS)
            q_sum0, q_sum1, k_sum0, k_sum1 = zeros, zeros, zeros, zeros
            carried = gl.zeros([BK], gl.float32, gl.SliceLayout(1, BY_COLUMNS))
            for v in gl.static_range(V // BV):
                stage = wait_until_full(full_values, number_of_block * (V // BV) + v)
                S, dS = to_states[0].index(stage), to_states[1].index(stage)
                q_sum0 = warpgroup_mma(S, do.index(0).permute((1, 0)), q_sum0, is_async=True)
                q_sum1 = warpgroup_mma(S, do.index(1).permute((1, 0)), q_sum1, is_async=True)
                k_sum0 = warpgroup_mma(dS, R.index(0).permute((1, 0)), k_sum0, is_async=True)
                k_sum1 = warpgroup_mma(dS, R.index(1).permute((1, 0)), k_sum1, is_async=True)
                carried += gl.sum(S.load(BY_COLUMNS).to(gl.float32) * dS.load(BY_COLUMNS).to(gl.float32), 1)
                q_sum0, q_sum1, k_sum0, k_sum1 = warpgroup_mma_wait(0, deps=[q_sum0, q_sum1, k_sum0, k_sum1])
                mbarrier.arrive(empty_values.index(stage), count=1)
            up, behind0, all0 = decays_of_half(high0, rest0, ones, zeros)
            left = gl.convert_layout((k0.to(gl.float32) * behind0).to(gl.bfloat16), left_of(SUMS))
            to_late = warpgroup_mma(left, to_pairs.index(1), zeros, is_async=True)  # the pairs of both halves
            q_sum0 *= up * scale
            k_sum0 *= behind0
            up1, behind, all1 = decays_of_half(high1, rest1, ones, zeros)
            left = gl.convert_layout((q1.to(gl.float32) * up1).to(gl.bfloat16), left_of(SUMS))
            to_early = warpgroup_mma(left, to_pairs.index(2), zeros, is_async=True)
            k_sum0 *= all1[:, None]
            k_sum1 *= behind
            # what goes on to the end of the span has part in the gradient of every row's decay
            onward = gl.convert_layout(carried, gl.SliceLayout(1, SUMS)) * (all0 * all1)
            onward += gl.sum(k0.to(gl.float32) * k_sum0 + k1.to(gl.float32) * k_sum1, 1)
            to_late, to_early = warpgroup_mma_wait(0, deps=[to_late, to_early])
            if block == K // BK - 1:
                mbarrier.arrive(empty_pairs.index(0), count=1)
            q_sum1 = up1 * (q_sum1 * (all0 * scale)[:, None] + to_late)
            k_sum0 += behind0 * to_early

            of_block = head * K + block * BK
            to_q, to_k = dq + first_token * dq_stride + of_block, dk + first_token * dk_stride + of_block
            to_g = dg + first_token * (HV * K) + of_block
            q_sum1, k_sum1 = pairs_of_half(q_sum1, k_sum1, q1, k1, high1, ones, by_level, 1, zeros, row, SUMS)
            per_row = q1.to(gl.float32) * q_sum1 - k1.to(gl.float32) * k_sum1
            high, rest = in_two_parts(per_row, SUMS)
            gradient = sum_of(high, rest, ones.index(FROM_HERE), zeros)
            store_half(
                q_sum1, k_sum1, q1, k1, of_late, to_q + C * dq_stride, to_k + C * dk_stride, dq_stride, dk_stride, C
            )
            gradient = warpgroup_mma_wait(0, deps=[gradient]) + onward[:, None]
            at = to_g + C * (HV * K) + wide_channel + wide_token * (HV * K)
            gl.store(at, gl.convert_layout(gradient, BY_WIDE_VALUES))
            onward += gl.sum(per_row, 1)
            q_sum0, k_sum0 = pairs_of_half(q_sum0, k_sum0, q0, k0, high0, ones, by_level, 0, zeros, row, SUMS)
            high, rest = in_two_parts(q0.to(gl.float32) * q_sum0 - k0.to(gl.float32) * k_sum0, SUMS)
            gradient = sum_of(high, rest, ones.index(FROM_HERE), zeros)
            store_half(q_sum0, k_sum0, q0, k0, of_early, to_q, to_k, dq_stride, dk_stride, C)
            gradient = warpgroup_mma_wait(0, deps=[gradient]) + onward[:, None]
            gl.store(to_g + wide_channel + wide_token * (HV * K), gl.convert_layout(gradient, BY_WIDE_VALUES))


@gluon.jit
def hopper_vector_span_keys_kernel(
    do, R, dP, q, k, g, S, dS, dq, dk, dg, num_tiles, scale, HV, GROUP, K, V, dq_stride, dk_stride
):  # fmt: skip
    C: gl.constexpr = q.block_type.shape[0]
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
    channels, values, states = (q, k, g), (do, R), (S, dS)
    to_pairs, to_channels = stages_for(dP, 4), all_stages_for(channels, 1)
    to_values, to_states = all_stages_for(values, 2), all_stages_for(states, 1)
    ones = gl.allocate_shared_memory(gl.bfloat16, [LEVELS + 3, C, C], SQUARE)
    by_level = gl.allocate_shared_memory(gl.bfloat16, [2 * LEVELS, C, C], SQUARE)
    full_pairs, empty_pairs = barriers(1)
    full_channels, empty_channels = barriers(1)
    full_values, empty_values = barriers(1)
    first, step = gl.program_id(0), gl.num_programs(0)
    gl.warp_specialize(
        [
            (compute_keys, (
                to_pairs, to_channels, to_values, to_states, ones, by_level,
                full_pairs, empty_pairs, full_channels, empty_channels, full_values, empty_values,
                dq, dk, dg, first, num_tiles, step, HV, scale, K, V, dq_stride, dk_stride,
            )),
            (copy_spans, (
                dP, to_pairs, channels, to_channels, values, to_values, states, to_states,
                full_pairs, empty_pairs, full_channels, empty_channels, full_values, empty_values,
                first, num_tiles, step, HV, GROUP, K, V,
            )),
        ],
        [COPYING_WARPS], [COPYING_REGISTERS],
    )  # fmt: skip
