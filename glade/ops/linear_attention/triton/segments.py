"""The states at the borders of the segments that long sequences are cut into, from what each segment does to a state.

A segment turns the state S before it into M S + N, and a gradient dS of the state after it into M^T dS + dN. N, dN and
M are made for all segments at once; this scan, over the few segments of a sequence, is all that remains in a row.
"""

# Triton is not installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from glade.ops.linear_attention.triton.tiles import sequence_chunks


@triton.jit
def scan_segments_kernel(
    M, N, given, states, last,
    segments_a_row, firsts,
    HV, K, V,
    KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    MATRIX: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`states` of each segment, the state before it (REVERSE: the gradient of the one after it), and `last`, what is
    behind all segments of a sequence; either of `given` (the state to begin with) and `last` may be None.

    M [segments, HV, KP, KP], key channels of the state before by those of the state after it, or without erase (not
    MATRIX) a number [segments, HV]; N [segments, HV, VP, KP]; states [segments, HV, K, V]. All are fp32.
    """
    NUM_BLOCKS: tl.constexpr = VP // BV
    sequence_head = tl.program_id(0) // NUM_BLOCKS
    n, head = sequence_head // HV, sequence_head % HV
    first, end = sequence_chunks(n, segments_a_row, firsts)
    dims, columns = tl.arange(0, KP), (tl.program_id(0) % NUM_BLOCKS) * BV + tl.arange(0, BV)
    in_state = (columns < V)[:, None] & (dims < K)[None, :]
    state_at = columns[:, None] + dims[None, :] * V
    of_sequence = sequence_head.to(tl.int64) * K * V
    if given is None:
        S = tl.zeros([BV, KP], tl.float32)
    else:
        S = tl.load(given + of_sequence + state_at, mask=in_state, other=0.0)
    # not pipelined: a trip reads what it has just written
    for step in tl.range(0, end - first, num_stages=1):
        segment = tl.zeros([], tl.int64) + (end - 1 - step if REVERSE else first + step)
        tile = segment * HV + head
        tl.store(states + tile * K * V + state_at, S, mask=in_state)
        made = tl.load(N + tile * VP * KP + columns[:, None] * KP + dims[None, :])
        if MATRIX:
            # a product's left side by blocks of its channels, which registers cannot be cut into: from memory
            tl.debug_barrier()
            for block in tl.static_range(0, KP // BK):
                summed = block * BK + tl.arange(0, BK)
                inside = (columns < V)[:, None] & (summed < K)[None, :]
                part = tl.load(
                    states + tile * K * V + columns[:, None] + summed[None, :] * V, mask=inside, other=0.0
                )  # fmt: skip
                if REVERSE:
                    matrix = tl.trans(tl.load(M + tile * KP * KP + dims[:, None] * KP + summed[None, :]))
                else:
                    matrix = tl.load(M + tile * KP * KP + summed[:, None] * KP + dims[None, :])
                made = tl.dot(part, matrix, made, input_precision=PRECISION)
            S = made
        else:
            S = made + S * tl.load(M + tile)
    if last is not None:
        tl.store(last + of_sequence + state_at, S, mask=in_state)
