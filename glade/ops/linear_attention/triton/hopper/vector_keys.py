"""The gradients of q, k, erase and g of `triton/vector_keys.py` for sm_90: its equations, for spans of one chunk.

A program takes one chunk and head after the other, 64 channels at a time, all as channels by tokens; pairs and sums of
logs as `levels.py` has them.
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
    sums_of,
    wait_until_empty,
    wait_until_full,
)
from glade.ops.linear_attention.triton.tiles import SCALAR, VECTOR


@gluon.jit
def copy_chunks(
    values, to_values, pairs, to_pairs, channels, to_channels, states, to_states,
    full_values, empty_values, full_channels, empty_channels, full_states, empty_states,
    first, end, step, HV, GROUP, K, V,
):  # fmt: skip
    """The copying warp: of a chunk do, R, dR^, dP and dT, then, BK channels at a time, q, k, g and a vector erase, and
    S and dS by blocks of value channels."""
    C: gl.constexpr = channels[0].block_type.shape[0]
    BK: gl.constexpr = channels[0].block_type.shape[1]
    BV: gl.constexpr = states[0].block_type.shape[1]
    for number in range(gl.cdiv(end - first, step)):
        tile, span, head = tile_at(number, first, step, HV)
        stage = wait_until_empty(empty_values, number)
        barrier = full_values.index(stage)
        mbarrier.expect(barrier, bytes_of(values) * (V // BV) + bytes_of(pairs))
        copy_tiles(pairs, [tile * C, 0], barrier, to_pairs, stage)
        for i in gl.static_range(len(values)):
            for v in gl.static_range(V // BV):
                place = [span * C, head * V + v * BV]
                tma.async_copy_global_to_shared(values[i], place, barrier, to_values[i].index(v))
        for block in range(K // BK):
            number_of_block = number * (K // BK) + block
            stage = wait_until_empty(empty_channels, number_of_block)
            barrier = full_channels.index(stage)
            mbarrier.expect(barrier, bytes_of(channels))
            for i in gl.static_range(len(channels)):
                place = [span * C, (head // GROUP if i < 2 else head) * K + block * BK]
                tma.async_copy_global_to_shared(channels[i], place, barrier, to_channels[i].index(stage))
            for v in gl.static_range(V // BV):
                stage = wait_until_empty(empty_states, number_of_block * (V // BV) + v)
                barrier = full_states.index(stage)
                mbarrier.expect(barrier, bytes_of(states))
                copy_tiles(states, [tile * K + block * BK, v * BV], barrier, to_states, stage)


@gluon.jit
def compute_keys(
    to_values, to_pairs, to_channels, to_states, ones, dP_by_level, dT_by_level,
    full_values, empty_values, full_channels, empty_channels, full_states, empty_states,
    erase, erase_strides, dq, dk, d_erase, dg,
    first, end, step, HV, num_token_heads, scale, K, V, dq_stride, dk_stride, ERASE: gl.constexpr,
):  # fmt: skip
    do, R, dR = to_values
    C: gl.constexpr = do.shape[1]
    BV: gl.constexpr = do.shape[2]
    BK: gl.constexpr = to_channels[0].shape[2]
    SUMS: gl.constexpr = sums_of(C)  # [channels, tokens]
    other = gl.arange(0, C, gl.SliceLayout(1, BY_COLUMNS))[:, None]
    token = gl.arange(0, C, gl.SliceLayout(0, BY_COLUMNS))[None, :]
    store_ones(ones, other, token)
    zeros = gl.zeros([BK, C], gl.float32, SUMS)
    row = gl.arange(0, C, gl.SliceLayout(0, SUMS))
    channel = gl.arange(0, BK, gl.SliceLayout(1, SUMS))[:, None]
    for number in range(gl.cdiv(end - first, step)):
        _, span, head = tile_at(number, first, step, HV)
        first_token = (span * C).to(gl.int64)
        stage = wait_until_full(full_values, number)
        d_products = to_pairs[0].index(stage).load(BY_COLUMNS)
        store_levels(dP_by_level, d_products, other, token, 0)
        store_levels(dT_by_level, to_pairs[1].index(stage).load(BY_COLUMNS), other, token, 0)
        with_itself = with_themselves(d_products, other, token)
        with_itself = gl.convert_layout(with_itself, gl.SliceLayout(0, SUMS))[None, :]
        fence_async_shared()
        if ERASE == SCALAR:
            of_tokens = erase + first_token * erase_strides[0] + head * erase_strides[1]
            gate = gl.load(of_tokens + row * erase_strides[0]).to(gl.float32)[None, :]
        for block in range(K // BK):
            number_of_block = number * (K // BK) + block
            nothing = nothing_at(block if K > BK else number)
            stage = wait_until_full(full_channels, number_of_block)
            q_tile = to_channels[0].index(stage).permute((1, 0)).load(SUMS)
            k_tile = to_channels[1].index(stage).permute((1, 0)).load(SUMS)
            logs = log2_decay(load_turned(to_channels[2], stage, SUMS))
            if ERASE == VECTOR:
                gate_tile = to_channels[3].index(stage).permute((1, 0)).load(SUMS)
            mbarrier.arrive(empty_channels.index(stage), count=1)
            high, rest = in_two_parts(logs, SUMS)
            up_to = sum_of(high, rest, ones.index(UP_TO + nothing), zeros)
            behind = sum_of(high, rest, ones.index(BEHIND + nothing), zeros)
            q_sum, k_sum, e_sum = zeros, zeros, zeros
            carried = gl.zeros([BK, BK], gl.float32, sums_of(BK))
            for v in range(V // BV):
                stage = wait_until_full(full_states, number_of_block * (V // BV) + v)
                S, dS = to_states[0].index(stage), to_states[1].index(stage)
                q_sum = warpgroup_mma(S, do.index(v).permute((1, 0)), q_sum, is_async=True)
                e_sum = warpgroup_mma(S, dR.index(v).permute((1, 0)), e_sum, is_async=True)
                k_sum = warpgroup_mma(dS, R.index(v).permute((1, 0)), k_sum, is_async=True)
                carried = warpgroup_mma(S, dS.permute((1, 0)), carried, is_async=True)
                q_sum, e_sum, k_sum, carried = warpgroup_mma_wait(0, deps=[q_sum, e_sum, k_sum, carried])
                mbarrier.arrive(empty_states.index(stage), count=1)
            if block == K // BK - 1:
                mbarrier.arrive(empty_values.index(0), count=1)
            up_to, behind = warpgroup_mma_wait(0, deps=[up_to, behind])
            to_row = gl.exp2(up_to)
            q_sum *= to_row * scale
            e_sum *= -to_row
            k_sum *= gl.exp2(behind)
            # what goes on to the end of the chunk has part in the gradient of every row's decay
            onward = diagonal_of(carried, SUMS) * gl.exp2(gl.min(up_to, 1))  # they never rise
            onward += gl.sum(k_tile.to(gl.float32) * k_sum, 1)
            # the logs' rest is left out, as in `triton/vector_keys.py`
            logs = warpgroup_mma(high, ones.index(nothing), zeros)
            for level in range(LEVELS):
                x_late, x_early = decays_of_halves(logs, row, level)
                q, k = q_tile.to(gl.float32), k_tile.to(gl.float32)
                if ERASE == VECTOR:
                    gate = gate_tile.to(gl.float32)
                left = gl.convert_layout((q * x_late + k * x_early).to(gl.bfloat16), left_of(SUMS))
                of_products = warpgroup_mma(left, dP_by_level.index(level + nothing), zeros, is_async=True)
                left = gl.convert_layout((k * (gate * x_late + x_early)).to(gl.bfloat16), left_of(SUMS))
                of_lower = warpgroup_mma(left, dT_by_level.index(level + nothing), zeros, is_async=True)
                logs = warpgroup_mma(high, ones.index(level + 1 + nothing), zeros, is_async=True)  # of the next level
                of_products, of_lower, logs = warpgroup_mma_wait(0, deps=[of_products, of_lower, logs])
                q_sum += of_products * x_late
                e_sum += of_lower * x_late
                k_sum += (of_products + of_lower) * x_early
            q, k = q_tile.to(gl.float32), k_tile.to(gl.float32)
            if ERASE == VECTOR:
                gate = gate_tile.to(gl.float32)
            of_erase = k * e_sum
            # the diagonal pairs, which do not decay, are not in these sums yet
            high, rest = in_two_parts(q * q_sum - k * k_sum + gate * of_erase, SUMS)
            gradient = sum_of(high, rest, ones.index(UP_TO + nothing).permute((1, 0)), zeros)  # from each row on
            of_block = head * K + block * BK
            store_rows(dq + first_token * dq_stride + of_block, dq_stride, q_sum + with_itself * k)
            of_k = k_sum + with_itself * q + gate * e_sum
            store_rows(dk + first_token * dk_stride + of_block, dk_stride, of_k)
            if ERASE == VECTOR:
                store_rows(d_erase + first_token * (HV * K) + of_block, HV * K, of_erase)
            else:
                to_e = d_erase + block.to(gl.int64) * num_token_heads + first_token * HV + head
                gl.store(to_e + row * HV, gl.sum(of_erase, 0).to(d_erase.dtype.element_ty))
            gradient = warpgroup_mma_wait(0, deps=[gradient]) + onward[:, None]
            to_g = dg + first_token * (HV * K) + of_block
            gl.store(to_g + channel + row[None, :] * (HV * K), gradient)


@gluon.jit
def hopper_vector_keys_kernel(
    do, R, dR, dP, dT, q, k, g, erase, S, dS, erase_rows, erase_strides, dq, dk, d_erase, dg,
    num_tiles, num_token_heads, scale,
    HV, GROUP, K, V, dq_stride, dk_stride, ERASE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = q.block_type.shape[0]
    BV: gl.constexpr = do.block_type.shape[1]
    values, pairs, channels, states = (do, R, dR), (dP, dT), (q, k, g), (S, dS)
    if ERASE == VECTOR:
        channels += (erase,)
    to_values, to_pairs = all_stages_for(values, V // BV), all_stages_for(pairs, 1)
    to_channels, to_states = all_stages_for(channels, 1), all_stages_for(states, STAGES)
    ones = squares_of(LEVELS + 2, C)
    dP_by_level = squares_of(LEVELS, C)
    dT_by_level = squares_of(LEVELS, C)
    full_values, empty_values = barriers(1)
    full_channels, empty_channels = barriers(1)
    full_states, empty_states = barriers(STAGES)
    first, step = gl.program_id(0), gl.num_programs(0)
    gl.warp_specialize(
        [
            (compute_keys, (
                to_values, to_pairs, to_channels, to_states, ones, dP_by_level, dT_by_level,
                full_values, empty_values, full_channels, empty_channels, full_states, empty_states,
                erase_rows, erase_strides, dq, dk, d_erase, dg,
                first, num_tiles, step, HV, num_token_heads, scale, K, V, dq_stride, dk_stride, ERASE,
            )),
            (copy_chunks, (
                values, to_values, pairs, to_pairs, channels, to_channels, states, to_states,
                full_values, empty_values, full_channels, empty_channels, full_states, empty_states,
                first, num_tiles, step, HV, GROUP, K, V,
            )),
        ],
        [COPYING_WARPS], [COPYING_REGISTERS],
    )  # fmt: skip
