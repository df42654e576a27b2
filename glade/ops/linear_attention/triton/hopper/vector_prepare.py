"""What `triton/prepare.py` makes of a chunk with a vector decay, for sm_90; the inverse it leaves to `inverse_kernel`.

A program takes one chunk and head after the other, 64 channels at a time, all as channels by tokens, with sums of logs
as `levels.py` has them. Of each level the gated q, and erase k below them, are the left side of one product of 64 rows,
and the gated k the right one. All pairs of tokens are made, and of each the one of its level is taken at the end.
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
    in_two_parts,
    log2_decay,
    nothing_at,
    store_ones,
    sum_of,
    tile_at,
)
from glade.ops.linear_attention.triton.hopper.pipeline import (
    BY_COLUMNS,
    COPYING_REGISTERS,
    COPYING_WARPS,
    all_stages_for,
    barriers,
    buffer_for,
    bytes_of,
    copy_tiles,
    load_turned,
    squares_of,
    sums_of,
    wait_until_empty,
    wait_until_full,
)
from glade.ops.linear_attention.triton.tiles import NONE, SCALAR, VECTOR


@gluon.jit
def copy_chunks(q, k, to_q_and_k, channels, to_channels, full, empty, first, end, step, HV, GROUP, K):
    """The copying warp: BK channels of a chunk at a time, of q, k, g and a vector erase."""
    C: gl.constexpr = q.block_type.shape[0]
    BK: gl.constexpr = q.block_type.shape[1]
    for number in range(gl.cdiv(end - first, step)):
        _, m, head = tile_at(number, first, step, HV)
        for block in range(K // BK):
            stage = wait_until_empty(empty, number * (K // BK) + block)
            barrier = full.index(stage)
            mbarrier.expect(barrier, bytes_of((q, k)) + bytes_of(channels))
            place = [m * C, head // GROUP * K + block * BK]
            both = to_q_and_k.index(stage)
            tma.async_copy_global_to_shared(q, place, barrier, both.slice(0, C))
            tma.async_copy_global_to_shared(k, place, barrier, both.slice(C, C))
            copy_tiles(channels, [m * C, head * K + block * BK], barrier, to_channels, stage)


@gluon.jit
def gated(x, decay, these, LEVEL: gl.constexpr):
    """x decayed at these tokens; of the others nobody asks for what comes out, which is what costs least: x as it is,
    where every thread knows beforehand which tokens these are."""
    return x * decay if LEVEL == 1 or LEVEL == 2 else gl.where(these, x * decay, x)


@gluon.jit
def of_their_levels(by_level, with_itself, scale, C: gl.constexpr):
    """Of all pairs by each level's decays [both, tokens], those of q above those of erase k, the ones that are: below
    the diagonal by the level where their tokens part, and on it those of q."""
    SUMS: gl.constexpr = with_itself.type.layout
    both = gl.arange(0, 2 * C, gl.SliceLayout(1, SUMS))[:, None]
    later, earlier = both % C, gl.arange(0, C, gl.SliceLayout(0, SUMS))[None, :]
    apart = later ^ earlier
    pairs = gl.where(apart == 0, with_itself, by_level[LEVELS - 1])
    for level in gl.static_range(LEVELS - 1):
        pairs = gl.where((apart >> level) == 1, by_level[level], pairs)
    there = (later > earlier) | ((later == earlier) & (both < C))
    return gl.where(there, pairs * gl.where(both < C, scale, 1.0), 0.0)


@gluon.jit
def compute_chunks(
    to_q_and_k, to_channels, ones, to_late, to_early, out_buffers, pairs_buffer, full, empty,
    Qg, Kt, Eg, decay, P, A, erase, erase_strides, write, write_strides, write_rows,
    first, end, step, HV, scale, K, ERASE: gl.constexpr, WRITE: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = to_early.shape[1]
    BK: gl.constexpr = to_early.shape[2]
    SUMS: gl.constexpr = sums_of(C)  # [channels, tokens], and [both, tokens]
    other = gl.arange(0, C, gl.SliceLayout(1, BY_COLUMNS))[:, None]
    token = gl.arange(0, C, gl.SliceLayout(0, BY_COLUMNS))[None, :]
    store_ones(ones, other, token)
    fence_async_shared()
    zeros = gl.zeros([2 * C, C], gl.float32, SUMS)
    row = gl.arange(0, C, gl.SliceLayout(0, SUMS))
    channel = gl.arange(0, BK, gl.SliceLayout(1, SUMS))
    for number in range(gl.cdiv(end - first, step)):
        tile, m, head = tile_at(number, first, step, HV)
        tokens = m.to(gl.int64) * C + row
        if ERASE == SCALAR:
            gate = gl.load(erase + tokens * erase_strides[0] + head * erase_strides[1]).to(gl.float32)[None, :]
        if WRITE == SCALAR:
            written = gl.load(write + tokens * write_strides[0] + head * write_strides[1])
            gl.store(write_rows + tile.to(gl.int64) * C + row, written.to(gl.float32))
        with_itself, by_level = zeros, (zeros, zeros, zeros, zeros, zeros)
        for block in range(K // BK):
            number_of_block = number * (K // BK) + block
            nothing = nothing_at(number_of_block)
            stage = wait_until_full(full, number_of_block)
            both = to_q_and_k.index(stage)
            q = both.slice(0, C).permute((1, 0)).load(SUMS).to(gl.float32)
            k = both.slice(C, C).permute((1, 0)).load(SUMS).to(gl.float32)
            logs = log2_decay(load_turned(to_channels[0], stage, SUMS))
            if ERASE == VECTOR:
                gate = load_turned(to_channels[1], stage, SUMS)
            with_itself = warpgroup_mma(both, both.slice(C, C).permute((1, 0)), with_itself, is_async=True)
            high, rest = in_two_parts(logs, SUMS)
            up_to = sum_of(high, rest, ones.index(UP_TO + nothing), zeros)
            behind = sum_of(high, rest, ones.index(BEHIND + nothing), zeros)
            logs = warpgroup_mma(high, ones.index(nothing), zeros, is_async=True)  # without their rest, as in the keys
            with_itself, up_to, behind, logs = warpgroup_mma_wait(0, deps=[with_itself, up_to, behind, logs])
            mbarrier.arrive(empty.index(stage), count=1)
            to_row = gl.exp2(up_to)
            whole = gl.exp2(gl.min(up_to, 1))  # they never rise
            tma.store_wait(0)  # what was stored before has left shared memory
            out_buffers[0].permute((1, 0)).store((q * (to_row * scale)).to(gl.bfloat16))
            out_buffers[1].permute((1, 0)).store((k * gl.exp2(behind)).to(gl.bfloat16))
            if ERASE != NONE:
                # rounded here, as if it were read
                e = (gate * k).to(gl.bfloat16).to(gl.float32)
                out_buffers[2].permute((1, 0)).store((e * to_row).to(gl.bfloat16))
            fence_async_shared()
            place = [tile * C, block * BK]
            tma.async_copy_shared_to_global(Qg, place, out_buffers[0])
            tma.async_copy_shared_to_global(Kt, place, out_buffers[1])
            if ERASE != NONE:
                tma.async_copy_shared_to_global(Eg, place, out_buffers[2])
            made = ()
            for level in gl.static_range(LEVELS):
                x = gl.exp2(logs)
                half = (row >> level) & 1
                late, early = (half == 1)[None, :], (half == 0)[None, :]
                left, right = to_late.index(level % 2 + nothing), to_early.index(level % 2 + nothing)
                left.slice(0, C).permute((1, 0)).store(gated(q, x, late, level).to(gl.bfloat16))
                if ERASE != NONE:
                    left.slice(C, C).permute((1, 0)).store(gated(e, x, late, level).to(gl.bfloat16))
                right.permute((1, 0)).store(gated(k, x, early, level).to(gl.bfloat16))
                fence_async_shared()
                pairs = warpgroup_mma(left, right.permute((1, 0)), by_level[level], is_async=True)
                logs = warpgroup_mma(high, ones.index(level + 1 + nothing), zeros, is_async=True)  # of the next level
                pairs, logs = warpgroup_mma_wait(0, deps=[pairs, logs])
                made += (pairs,)
            by_level = made
            gl.store(decay + tile.to(gl.int64) * K + block * BK + channel, whole)  # no fence has to wait for it here
        pairs = of_their_levels(by_level, with_itself, scale, C)
        tma.store_wait(0)
        pairs_buffer.store(pairs.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(P, [tile * C, 0], pairs_buffer.slice(0, C))
        if ERASE != NONE:
            tma.async_copy_shared_to_global(A, [tile * C, 0], pairs_buffer.slice(C, C))
    tma.store_wait(0)


@gluon.jit
def hopper_vector_prepare_kernel(
    q, k, g, erase, Qg, Kt, Eg, decay, P, A, erase_rows, erase_strides, write, write_strides, write_rows,
    num_tiles, scale, HV, GROUP, K,
    ERASE: gl.constexpr, WRITE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = q.block_type.shape[0]
    BK: gl.constexpr = q.block_type.shape[1]
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
    channels = (g,)
    if ERASE == VECTOR:
        channels += (erase,)
    out_buffers = (buffer_for(Qg), buffer_for(Kt))
    if ERASE != NONE:
        out_buffers += (buffer_for(Eg),)
    to_q_and_k = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * C, BK], q.layout)
    to_channels = all_stages_for(channels, STAGES)
    ones = squares_of(LEVELS + 2, C)
    to_late = gl.allocate_shared_memory(gl.bfloat16, [2, 2 * C, BK], q.layout)
    to_early = gl.allocate_shared_memory(gl.bfloat16, [2, C, BK], q.layout)
    pairs_buffer = gl.allocate_shared_memory(gl.bfloat16, [2 * C, C], SQUARE)
    full, empty = barriers(STAGES)
    first, step = gl.program_id(0), gl.num_programs(0)
    gl.warp_specialize(
        [
            (compute_chunks, (
                to_q_and_k, to_channels, ones, to_late, to_early, out_buffers, pairs_buffer, full, empty,
                Qg, Kt, Eg, decay, P, A, erase_rows, erase_strides, write, write_strides, write_rows,
                first, num_tiles, step, HV, scale, K, ERASE, WRITE,
            )),
            (copy_chunks, (
                q, k, to_q_and_k, channels, to_channels, full, empty, first, num_tiles, step, HV, GROUP, K,
            )),
        ],
        [COPYING_WARPS], [COPYING_REGISTERS],
    )  # fmt: skip
