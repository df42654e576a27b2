"""The gradients of q, k and g of `triton/vector_keys.py` for sm_90 where nothing is erased: spans of two chunks.

As in `vector_keys.py`: each chunk is a half of the span, and pairs of both are a level more, whose factors are those of
the halves' sums.
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

from glade.ops.linear_attention.triton.hopper.levels import (
    BEHIND,
    LEVELS,
    UP_TO,
    decays_of_halves,
    diagonal_of,
    in_two_parts,
    log2_decay,
    nothing_at,
    store_levels,
    store_ones,
    store_rows,
    sum_of,
    tile_at,
    with_themselves,
)
from glade.ops.linear_attention.triton.hopper.pipeline import (
    BY_COLUMNS,
    COPYING_REGISTERS,
    COPYING_WARPS,
    all_stages_for,
    barriers,
    bytes_of,
    copy_tiles,
    left_of,
    load_turned,
    squares_of,
    stages_for,
    sums_of,
    wait_until_empty,
    wait_until_full,
)

# Pairs of the halves' own tokens, and of both halves'.
EARLY, BOTH, LATE = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.jit
def copy_half(
    channels, to_channels, full_channels, empty_channels, number_of_block, span, of_keys, of_gate, HALF: gl.constexpr
):  # fmt: skip
    """q, k and g of a half, which has a stage of its own."""
    C: gl.constexpr = channels[0].block_type.shape[0]
    stage = wait_until_empty(empty_channels, 2 * number_of_block + HALF)
    barrier = full_channels.index(stage)
    mbarrier.expect(barrier, bytes_of(channels))
    for i in gl.static_range(len(channels)):
        place = [(span * 2 + HALF) * C, of_keys if i < 2 else of_gate]
        tma.async_copy_global_to_shared(channels[i], place, barrier, to_channels[i].index(stage))


@gluon.jit
def copy_spans(
    pairs, to_pairs, channels, to_channels, values, to_values, states, to_states,
    full_pairs, empty_pairs, full_channels, empty_channels, full_values, empty_values,
    first, end, step, HV, GROUP, K, V,
):  # fmt: skip
    """The copying warp: of a span dP, by halves, then, BK channels at a time, q, k and g of each half, and do, R, S and
    dS by blocks of value channels."""
    C: gl.constexpr = channels[0].block_type.shape[0]
    BK: gl.constexpr = channels[0].block_type.shape[1]
    BV: gl.constexpr = states[0].block_type.shape[1]
    stages: gl.constexpr = to_states[0].shape[0]
    for number in range(gl.cdiv(end - first, step)):
        tile, span, head = tile_at(number, first, step, HV)
        stage = wait_until_empty(empty_pairs, number)
        barrier = full_pairs.index(stage)
        mbarrier.expect(barrier, 3 * bytes_of((pairs,)))
        for i in gl.static_range(3):
            place = [tile * (2 * C) + i // 2 * C, (i + 1) // 2 * C]
            tma.async_copy_global_to_shared(pairs, place, barrier, to_pairs.index(i))
        for block in range(K // BK):
            number_of_block = number * (K // BK) + block
            of_keys, of_gate = head // GROUP * K + block * BK, head * K + block * BK
            copy_half(channels, to_channels, full_channels, empty_channels, number_of_block, span, of_keys, of_gate, 1)
            for v in gl.static_range(V // BV):
                stage = wait_until_empty(empty_values, number_of_block * (V // BV) + v)
                barrier = full_values.index(stage)
                mbarrier.expect(barrier, 2 * bytes_of(values) + bytes_of(states))
                copy_tiles(states, [tile * K + block * BK, v * BV], barrier, to_states, stage)
                for i in gl.static_range(len(values)):
                    for half in gl.static_range(2):
                        place = [(span * 2 + half) * C, head * V + v * BV]
                        tma.async_copy_global_to_shared(values[i], place, barrier, to_values[i].index(2 * stage + half))
                if v == stages - 1:  # its stage is empty when the block before is done, those of the values are sooner
                    copy_half(
                        channels, to_channels, full_channels, empty_channels, number_of_block, span, of_keys, of_gate, 0
                    )


@gluon.jit
def load_half(to_channels, HALF: gl.constexpr, SUMS: gl.constexpr):
    """q and k of a half, [channels, tokens]: they are loaded where they are needed, since to keep them takes registers
    that are not there."""
    q = to_channels[0].index(HALF).permute((1, 0)).load(SUMS)
    k = to_channels[1].index(HALF).permute((1, 0)).load(SUMS)
    return q.to(gl.float32), k.to(gl.float32)


@gluon.jit
def decays_of_half(to_channels, HALF: gl.constexpr, ones, nothing, zeros, SUMS: gl.constexpr):
    """The greater part of a half's logs; its decays to each token from the half's beginning, from it to the end, and
    [channels], over all of the half."""
    logs = log2_decay(load_turned(to_channels[2], HALF, SUMS))
    high, rest = in_two_parts(logs, SUMS)
    up_to = sum_of(high, rest, ones.index(UP_TO + nothing), zeros)
    behind = sum_of(high, rest, ones.index(BEHIND + nothing), zeros)
    up_to, behind = warpgroup_mma_wait(0, deps=[up_to, behind])
    return high, gl.exp2(up_to), gl.exp2(behind), gl.exp2(gl.min(up_to, 1))  # sums never rise


@gluon.jit
def gradients_of_half(
    q_sum, k_sum, onward, with_itself, high, to_channels, HALF: gl.constexpr, ones, by_level, nothing, zeros,
    to_q, to_k, to_g, dq_stride, dk_stride, dg_stride, SUMS: gl.constexpr,
):  # fmt: skip
    """Adds what the pairs within a half have part in, and stores its gradients; `onward` has part in that of every
    row's decay. Returns what goes on to the rows before this half."""
    q, k = load_half(to_channels, HALF, SUMS)
    row = gl.arange(0, q.shape[1], gl.SliceLayout(0, SUMS))
    logs = warpgroup_mma(high, ones.index(nothing), zeros)
    for level in range(LEVELS):
        x_late, x_early = decays_of_halves(logs, row, level)
        left = gl.convert_layout((q * x_late + k * x_early).to(gl.bfloat16), left_of(SUMS))
        of_others = warpgroup_mma(left, by_level.index(HALF * LEVELS + level + nothing), zeros, is_async=True)
        logs = warpgroup_mma(high, ones.index(level + 1 + nothing), zeros, is_async=True)  # of the next level
        of_others, logs = warpgroup_mma_wait(0, deps=[of_others, logs])
        q_sum += of_others * x_late
        k_sum += of_others * x_early
    per_row = q * q_sum - k * k_sum
    high, rest = in_two_parts(per_row, SUMS)
    gradient = sum_of(high, rest, ones.index(UP_TO + nothing).permute((1, 0)), zeros)  # from each row on
    # the diagonal pairs, which do not decay, come last
    store_rows(to_q, dq_stride, q_sum + with_itself * k)
    store_rows(to_k, dk_stride, k_sum + with_itself * q)
    gradient = warpgroup_mma_wait(0, deps=[gradient]) + onward[:, None]
    channel = gl.arange(0, q.shape[0], gl.SliceLayout(1, SUMS))[:, None]
    gl.store(to_g + channel + row[None, :] * dg_stride, gradient)
    return onward + gl.sum(per_row, 1)


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
    for number in range(gl.cdiv(end - first, step)):
        _, span, head = tile_at(number, first, step, HV)
        wait_until_full(full_pairs, number)
        early, late = to_pairs.index(EARLY).load(BY_COLUMNS), to_pairs.index(LATE).load(BY_COLUMNS)
        store_levels(by_level, early, other, token, 0)
        store_levels(by_level, late, other, token, LEVELS)
        early, late = with_themselves(early, other, token), with_themselves(late, other, token)
        of_early = gl.convert_layout(early, gl.SliceLayout(0, SUMS))[None, :]
        of_late = gl.convert_layout(late, gl.SliceLayout(0, SUMS))[None, :]
        fence_async_shared()
        first_token = (span * (2 * C)).to(gl.int64)
        for block in range(K // BK):
            number_of_block = number * (K // BK) + block
            nothing = nothing_at(block if K > BK else number)
            q_sum0, q_sum1, k_sum0, k_sum1 = zeros, zeros, zeros, zeros
            carried = gl.zeros([BK, BK], gl.float32, sums_of(BK))
            for v in range(V // BV):
                stage = wait_until_full(full_values, number_of_block * (V // BV) + v)
                S, dS = to_states[0].index(stage), to_states[1].index(stage)
                q_sum0 = warpgroup_mma(S, do.index(2 * stage).permute((1, 0)), q_sum0, is_async=True)
                q_sum1 = warpgroup_mma(S, do.index(2 * stage + 1).permute((1, 0)), q_sum1, is_async=True)
                k_sum0 = warpgroup_mma(dS, R.index(2 * stage).permute((1, 0)), k_sum0, is_async=True)
                k_sum1 = warpgroup_mma(dS, R.index(2 * stage + 1).permute((1, 0)), k_sum1, is_async=True)
                carried = warpgroup_mma(S, dS.permute((1, 0)), carried, is_async=True)
                q_sum0, q_sum1, k_sum0, k_sum1, carried = warpgroup_mma_wait(
                    0, deps=[q_sum0, q_sum1, k_sum0, k_sum1, carried]
                )
                mbarrier.arrive(empty_values.index(stage), count=1)
            # pairs of both halves have the factors of each half's sums; the later half first, which leaves less to keep
            wait_until_full(full_channels, 2 * number_of_block + 1)
            high1, up, behind, all1 = decays_of_half(to_channels, 1, ones, nothing, zeros, SUMS)
            q, k = load_half(to_channels, 1, SUMS)
            left = gl.convert_layout((q * up).to(gl.bfloat16), left_of(SUMS))
            to_early = warpgroup_mma(left, to_pairs.index(BOTH + nothing).permute((1, 0)), zeros, is_async=True)
            k_sum1 *= behind
            onward = gl.sum(k * k_sum1, 1)
            wait_until_full(full_channels, 2 * number_of_block)
            to_early = warpgroup_mma_wait(0, deps=[to_early])
            high0, up0, behind, all0 = decays_of_half(to_channels, 0, ones, nothing, zeros, SUMS)
            q, k = load_half(to_channels, 0, SUMS)
            left = gl.convert_layout((k * behind).to(gl.bfloat16), left_of(SUMS))
            to_late = warpgroup_mma(left, to_pairs.index(BOTH + nothing), zeros, is_async=True)
            k_sum0 *= behind * all1[:, None]
            # what goes on to the end of the span has part in the gradient of every row's decay
            onward += diagonal_of(carried, SUMS) * (all0 * all1) + gl.sum(k * k_sum0, 1)
            k_sum0 += behind * to_early
            q_sum0 *= up0 * scale
            to_late = warpgroup_mma_wait(0, deps=[to_late])
            if block == K // BK - 1:
                mbarrier.arrive(empty_pairs.index(0), count=1)
            q_sum1 = up * (q_sum1 * (all0 * scale)[:, None] + to_late)

            of_block = head * K + block * BK
            to_q, to_k = dq + first_token * dq_stride + of_block, dk + first_token * dk_stride + of_block
            to_g = dg + first_token * (HV * K) + of_block
            onward = gradients_of_half(
                q_sum1, k_sum1, onward, of_late, high1, to_channels, 1, ones, by_level, nothing, zeros,
                to_q + C * dq_stride, to_k + C * dk_stride, to_g + C * (HV * K), dq_stride, dk_stride, HV * K, SUMS,
            )  # fmt: skip
            mbarrier.arrive(empty_channels.index(1), count=1)
            gradients_of_half(
                q_sum0, k_sum0, onward, of_early, high0, to_channels, 0, ones, by_level, nothing, zeros,
                to_q, to_k, to_g, dq_stride, dk_stride, HV * K, SUMS,
            )  # fmt: skip
            mbarrier.arrive(empty_channels.index(0), count=1)


@gluon.jit
def hopper_vector_span_keys_kernel(
    do, R, dP, q, k, g, S, dS, dq, dk, dg, num_tiles, scale, HV, GROUP, K, V, dq_stride, dk_stride,
    STAGES: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = q.block_type.shape[0]
    channels, values, states = (q, k, g), (do, R), (S, dS)
    to_pairs, to_channels = stages_for(dP, 3), all_stages_for(channels, 2)  # of each half
    to_values, to_states = all_stages_for(values, 2 * STAGES), all_stages_for(states, STAGES)
    ones = squares_of(LEVELS + 2, C)
    by_level = squares_of(2 * LEVELS, C)
    full_pairs, empty_pairs = barriers(1)
    full_channels, empty_channels = barriers(2)
    full_values, empty_values = barriers(STAGES)
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
