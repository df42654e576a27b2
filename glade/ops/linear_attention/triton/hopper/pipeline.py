"""What the kernels share: stages of shared memory that one warp fills while four compute, and where values lie in them.

A program is a warp that asks for copies by descriptor (TMA), which cost it next to nothing, and four that never ask for
any. For each stage the one waits until it is empty and the others until it is full.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

COPYING_WARPS = gl.constexpr(1)
COPYING_REGISTERS = gl.constexpr(24)  # a thread's; those that compute have what these leave

# Where threads keep [values, columns] that they load or store, the columns, or the values, beside each other in memory.
BY_COLUMNS = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
BY_VALUES = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
BY_WIDE_VALUES = gl.constexpr(gl.BlockedLayout([4, 1], [16, 2], [1, 4], [0, 1]))  # of fp32


@gluon.constexpr_function
def sums_of(columns):
    """Where the four warps keep the sums of a product [64, columns], each of them sixteen rows."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def left_of(sums):
    """Where they keep the left side of a product with these sums: a product of bf16 is one as it is."""
    return gl.DotOperandLayout(0, sums, 2)


@gluon.jit
def chunks_of_sequence(n, a_row, a_sequence):
    """First chunk and end of sequence n: a batch row, or a segment of one, of `a_sequence` chunks but for the last."""
    sequences_a_row = gl.cdiv(a_row, a_sequence)
    row = n // sequences_a_row
    first = row * a_row + (n - row * sequences_a_row) * a_sequence
    return first, gl.minimum(first + a_sequence, (row + 1) * a_row)


@gluon.jit
def place_of_program(HV, a_row, a_sequence, spans_a_row, spans_a_sequence, BLOCKS: gl.constexpr):
    """Of a program of a pass: its sequence's head and block of value channels, the chunks from `first` up to `end`, and
    their first span."""
    sequence_head, block = gl.program_id(0) // BLOCKS, gl.program_id(0) % BLOCKS
    n, head = sequence_head // HV, sequence_head % HV
    first, end = chunks_of_sequence(n, a_row, a_sequence)
    first_span, _ = chunks_of_sequence(n, spans_a_row, spans_a_sequence)
    return sequence_head, head, block, first, end, first_span


@gluon.jit
def buffer_for(tiles):
    """Shared memory for one tile of a descriptor."""
    return gl.allocate_shared_memory(tiles.dtype, tiles.block_type.shape, tiles.layout)


@gluon.jit
def square_of(C: gl.constexpr):
    """For pairs of a chunk's tokens, as a product takes them."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
    return gl.allocate_shared_memory(gl.bfloat16, [C, C], layout)


@gluon.jit
def squares_of(NUMBER: gl.constexpr, C: gl.constexpr):
    """The same NUMBER times."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
    return gl.allocate_shared_memory(gl.bfloat16, [NUMBER, C, C], layout)


@gluon.jit
def stages_for(tiles, STAGES: gl.constexpr):
    """For STAGES tiles."""
    tile: gl.constexpr = tiles.block_type.shape
    return gl.allocate_shared_memory(tiles.dtype, [STAGES, tile[0], tile[1]], tiles.layout)


@gluon.jit
def all_stages_for(tiles, STAGES: gl.constexpr):
    """For STAGES tiles of each of several."""
    buffers = ()
    for i in gl.static_range(len(tiles)):
        buffers += (stages_for(tiles[i], STAGES),)
    return buffers


@gluon.jit
def barriers(STAGES: gl.constexpr):
    """For every stage, one that is passed when it is full, and one that is when it may be filled again."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    return full, empty


@gluon.constexpr_function
def bytes_of(tiles):
    """Of a tile of each descriptor."""
    blocks = [x.type.block_type for x in tiles]
    return sum(block.numel * block.element_ty.primitive_bitwidth // 8 for block in blocks)


@gluon.jit
def wait_until_full(full, step):
    """The stage of a step, when it is full."""
    stage = step % full.shape[0]
    mbarrier.wait(full.index(stage), (step // full.shape[0]) & 1)
    return stage


@gluon.jit
def wait_until_empty(empty, step):
    """The stage of a step, when it may be filled; before the first time at once."""
    stage = step % empty.shape[0]
    mbarrier.wait(empty.index(stage), ((step // empty.shape[0]) & 1) ^ 1)
    return stage


@gluon.jit
def copy_tiles(tiles, place, barrier, buffers, stage):
    """Asks for the tile at one place of each descriptor."""
    for i in gl.static_range(len(tiles)):
        tma.async_copy_global_to_shared(tiles[i], place, barrier, buffers[i].index(stage))


@gluon.jit
def copy_chunks(
    by_tokens, columns, to_tokens, by_chunks, to_chunks, full, empty, first, end, HV, head,
    C: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """The copying warp of a pass: tiles of the chunks from `first` up to `end`, or from the last one down; of tensors
    by tokens from `columns` on, and of those by chunks and heads."""
    SIZE: gl.constexpr = bytes_of(by_tokens) + bytes_of(by_chunks)
    for step in range(end - first):
        m = first + step
        if BACKWARD:
            m = end - 1 - step
        stage = wait_until_empty(empty, step)
        barrier = full.index(stage)
        mbarrier.expect(barrier, SIZE)
        for i in gl.static_range(len(by_tokens)):
            place = [m * C, columns[i]]
            tma.async_copy_global_to_shared(by_tokens[i], place, barrier, to_tokens[i].index(stage))
        for i in gl.static_range(len(by_chunks)):
            place = [(m * HV + head) * by_chunks[i].block_type.shape[0], 0]
            tma.async_copy_global_to_shared(by_chunks[i], place, barrier, to_chunks[i].index(stage))


@gluon.jit
def load_turned(buffer, stage, SUMS: gl.constexpr):
    """[values, tokens] in fp32, of a tile of tokens by values."""
    return buffer.index(stage).permute((1, 0)).load(SUMS).to(gl.float32)


@gluon.jit
def load_row(buffer, stage, SUMS: gl.constexpr):
    """A number for each column, of a tile of one row."""
    return buffer.index(stage).reshape([buffer.shape[2]]).load(gl.SliceLayout(0, SUMS))


@gluon.jit
def state_at(sequence_head, block, K, V, BV: gl.constexpr):
    """Where a state lies that is given or returned, [values, keys]."""
    values = block * BV + gl.arange(0, BV, gl.SliceLayout(1, BY_WIDE_VALUES))[:, None]
    keys = gl.arange(0, K, gl.SliceLayout(0, BY_WIDE_VALUES))[None, :]
    return sequence_head.to(gl.int64) * K * V + (keys * V + values)


@gluon.jit
def tokens_at(stride, BV: gl.constexpr, C: gl.constexpr):
    """Where a chunk's tokens lie from its first on, [values, tokens]."""
    values = gl.arange(0, BV, gl.SliceLayout(1, BY_VALUES))[:, None]
    return values + gl.arange(0, C, gl.SliceLayout(0, BY_VALUES))[None, :] * stride
