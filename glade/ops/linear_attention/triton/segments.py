"""The states at the borders of the segments that long sequences are cut into, from what each segment does to a state.

A segment turns the state S before it into M S + N, and a gradient dS of the state after it into M^T dS + dN. N, dN and
M are made for all segments at once; this scan, over the few segments of a sequence, is all that remains in a row. Where
decays are such that nothing of a state outlasts any segment, it takes N and dN as they are.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from glade.ops.linear_attention.triton.call import Call
from glade.ops.linear_attention.triton.configs import WIDE
from glade.ops.linear_attention.triton.launch import Segments, constants
from glade.ops.linear_attention.triton.launcher import start
from glade.ops.linear_attention.triton.tiles import sequence_chunks

SCANNED_BLOCK = 16  # value channels of a program of the scan: the fewest that a product takes
LARGEST_AT_ONCE = 128  # key channels whose M, fp32, fits twice into shared memory
SEGMENTS_AT_ONCE = tl.constexpr(64)


@triton.jit
def matrix_blocks(M, dims, first, NUM: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, REVERSE: tl.constexpr):
    """NUM blocks of BK rows of M, or REVERSE of its transpose, from row `first` on."""
    blocks = ()
    for block in tl.static_range(0, NUM):
        summed = first + block * BK + tl.arange(0, BK)
        if REVERSE:
            blocks += (tl.trans(tl.load(M + dims[:, None] * KP + summed[None, :])),)
        else:
            blocks += (tl.load(M + summed[:, None] * KP + dims[None, :]),)
    return blocks


@triton.jit
def tile_of_step(step, first, end, head, HV, REVERSE: tl.constexpr):
    """Segment and head, as one number, of a step of the scan."""
    segment = tl.zeros([], tl.int64) + (end - 1 - step if REVERSE else first + step)
    return segment * HV + head


@triton.jit
def none_reaches(reaches, first, end, head, HV):
    """Whether nothing of the state before a segment is left after it, of all segments from `first` up to `end`."""
    among, reaching = tl.arange(0, SEGMENTS_AT_ONCE), 0
    for block in tl.range(first, end, SEGMENTS_AT_ONCE):
        segment = block + among
        reaching += tl.sum(tl.load(reaches + segment * HV + head, mask=segment < end, other=0), 0)
    return reaching == 0


@triton.jit
def scan_segments_kernel(
    M, N, reaches, given, states, last,
    firsts, segments_a_row,
    HV, K, V,
    KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    MATRIX: tl.constexpr, BY_BLOCKS: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`states` of each segment, the state before it (REVERSE: the gradient of the one after it), and `last`, what is
    behind all segments of a sequence; either of `given` (the state to begin with) and `last` may be None.

    M [segments, HV, KP, KP], key channels of the state before by those of the state after it, or without erase (not
    MATRIX) its diagonal [segments, HV, KP]; N [segments, HV, VP, KP]; states [segments, HV, K, V]. All are fp32.
    `reaches` [segments, HV] int32 is zero where M is zero; None: it never is.
    """
    NUM_BLOCKS: tl.constexpr = VP // BV
    sequence_head = tl.program_id(0) // NUM_BLOCKS
    n, head = sequence_head // HV, sequence_head % HV
    first, end = sequence_chunks(n, firsts, segments_a_row, None)
    dims, columns = tl.arange(0, KP), (tl.program_id(0) % NUM_BLOCKS) * BV + tl.arange(0, BV)
    in_state = (columns < V)[:, None] & (dims < K)[None, :]
    state_at = columns[:, None] + dims[None, :] * V
    of_sequence = sequence_head.to(tl.int64) * K * V
    if given is None:
        S = tl.zeros([BV, KP], tl.float32)
    else:
        S = tl.load(given + of_sequence + state_at, mask=in_state, other=0.0)
    without = 0  # steps that take no matrix: all or none, for a matrix under a condition could not be copied ahead
    if reaches is not None:
        without = tl.where(none_reaches(reaches, first, end, head, HV), end - first, 0)
    made_at = columns[:, None] * KP + dims[None, :]
    for step in tl.range(0, without, num_stages=STAGES):
        tile = tile_of_step(step, first, end, head, HV, REVERSE)
        made = tl.load(N + tile * VP * KP + made_at)
        tl.store(states + tile * K * V + state_at, S, mask=in_state)
        S = made
    for step in tl.range(without, end - first, num_stages=STAGES):
        tile = tile_of_step(step, first, end, head, HV, REVERSE)
        made = tl.load(N + tile * VP * KP + made_at)
        if not MATRIX:
            tl.store(states + tile * K * V + state_at, S, mask=in_state)
            S = made + S * tl.load(M + tile * KP + dims)[None, :]
        elif not BY_BLOCKS:
            tl.store(states + tile * K * V + state_at, S, mask=in_state)
            matrix = tl.load(M + tile * KP * KP + dims[:, None] * KP + dims[None, :])
            if REVERSE:
                matrix = tl.trans(matrix)
            S = tl.dot(S, matrix, made, input_precision=PRECISION)
        else:
            # By blocks: of the left side from memory, since registers cannot be cut into them. As many of the right
            # side as registers hold are on their way before, or each product would wait for its own.
            NUM: tl.constexpr = min(4, KP // BK)
            blocks = matrix_blocks(M + tile * KP * KP, dims, 0, NUM, KP, BK, REVERSE)
            tl.store(states + tile * K * V + state_at, S, mask=in_state)
            tl.debug_barrier()
            parts = ()
            for block in tl.static_range(0, KP // BK):
                summed = block * BK + tl.arange(0, BK)
                inside = (columns < V)[:, None] & (summed < K)[None, :]
                part_at = columns[:, None] + summed[None, :] * V
                parts += (tl.load(states + tile * K * V + part_at, mask=inside, other=0.0),)
            for block in tl.static_range(0, KP // BK):
                if block > 0 and block % NUM == 0:
                    blocks = matrix_blocks(M + tile * KP * KP, dims, block * BK, NUM, KP, BK, REVERSE)
                made = tl.dot(parts[block], blocks[block % NUM], made, input_precision=PRECISION)
            S = made
    if last is not None:
        tl.store(last + of_sequence + state_at, S, mask=in_state)


def what_segments_keep(call: Call, v: Tensor) -> Tensor:
    """Empty: M of every segment. It is kept for the backward: 4 K K bytes a segment, while to make it again takes
    K / V of the first pass."""
    return of_segments(call, v, *(call.KP,) * (1 + (call.erase > 0)))


def of_segments(call: Call, x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(call.num_segments, call.HV, *shape, dtype=torch.float32)


def blocks_of_both(call: Call, BV: int) -> int:
    """How many blocks of BV channels hold the columns of N and those of M."""
    return call.VP // BV + (-(-call.KP // BV) if call.erase else 0)


def scan_segments(
    call: Call, segments: Segments, M: Tensor, N: Tensor, reaches: Tensor | None, given, last, reverse: bool
) -> Tensor:
    """What `scan_segments_kernel` calls states."""
    states = of_segments(call, N, call.K, call.V)
    by_blocks = call.KP > LARGEST_AT_ONCE
    start(
        scan_segments_kernel, call.VP // SCANNED_BLOCK * segments.whole.sequences * call.HV,
        M, N, reaches, given, states, last, segments.whole.firsts, segments.whole.a_row,
        *constants(call.HV, call.K, call.V),
        KP=call.KP, VP=call.VP, BV=SCANNED_BLOCK, BK=min(call.KP, 32),
        MATRIX=call.erase > 0, BY_BLOCKS=by_blocks, REVERSE=reverse, PRECISION=WIDE.precision,
        STAGES=1 if by_blocks else 3,  # by blocks a trip reads what it has just written: no copy may go ahead of that
        num_warps=8 if call.KP > 64 else 4,
    )  # fmt: skip
    return states
