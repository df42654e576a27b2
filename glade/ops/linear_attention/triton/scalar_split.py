"""The launches that cut long sequences with scalar gates into segments: the states at their borders, from which the
passes over states then take each segment as a sequence of its own.

    forward    what each segment does to a state (M, N), then the scan over segments, from the given state
    backward   what each segment adds to a gradient (dN), then the scan from the last segment to the first, with M
"""

# Triton is not installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
from torch import Tensor

from glade.ops.linear_attention.triton.call import FEW_PROGRAMS, Call
from glade.ops.linear_attention.triton.configs import WIDE
from glade.ops.linear_attention.triton.launch import Segments, constants, strides_of
from glade.ops.linear_attention.triton.scalar_segments import (
    scalar_backward_segments_kernel,
    scalar_forward_segments_kernel,
)
from glade.ops.linear_attention.triton.segments import scan_segments_kernel

SCANNED_BLOCK = 16  # value channels of a program of the scan: the fewest that a product takes


def what_segments_keep(call: Call, v: Tensor) -> Tensor:
    """Empty: M of every segment. It is kept for the backward: 4 K K bytes a segment, while to make it again takes
    K / V of the first pass."""
    shape = (call.num_segments, call.HV) + (call.KP, call.KP) * (call.erase > 0)
    return v.new_empty(shape, dtype=torch.float32)


def states_before(call: Call, segments: Segments, k, v, write, initial, final: Tensor, kept: list[Tensor]) -> Tensor:
    """The state before each segment, and into `final` the one after the last."""
    M, N = kept[6], _of_segments(call, v, call.VP, call.KP)
    launch = call.config.forward
    BV = call.value_block(launch, segments.chunks, FEW_PROGRAMS)
    blocks = call.VP // BV + (-(-call.KP // BV) if call.erase else 0)
    scalar_forward_segments_kernel[(blocks * segments.chunks.sequences * call.HV,)](
        k, v, write, *(strides_of(x) for x in (k, v, write)),
        *kept[:4], M, N, *call.along(segments.chunks),
        *constants(call.HV, call.group, call.K, call.V),
        KP=call.KP, VP=call.VP, BV=BV, NUM_BLOCKS=blocks, C=call.chunk,
        GATE=call.gate, ERASE=call.erase, WRITE=call.write, PACKED=call.packed, **call.types,
        STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip
    return _scan(call, segments, M, N, initial, final, reverse=False)


def gradients_after(call: Call, segments: Segments, do, q, k, scale: float, d_final, d_initial, kept) -> Tensor:
    """The gradient of the state after each segment, and into `d_initial` that of the given one."""
    G, erase_rows, _, A = kept[:4]
    dN = _of_segments(call, do, call.VP, call.KP)
    launch = call.config.backward
    BV = call.value_block(launch, segments.chunks, FEW_PROGRAMS)
    scalar_backward_segments_kernel[(call.VP // BV * segments.chunks.sequences * call.HV,)](
        do, q, k, *(strides_of(x) for x in (q, k)),
        G, erase_rows, A, dN, *call.along(segments.chunks), scale,
        *constants(call.HV, call.group, call.K, call.V),
        KP=call.KP, VP=call.VP, BV=BV, C=call.chunk,
        GATE=call.gate, ERASE=call.erase, PACKED=call.packed, **call.types,
        STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip
    return _scan(call, segments, kept[6], dN, d_final, d_initial, reverse=True)


def _scan(call: Call, segments: Segments, M: Tensor, N: Tensor, given, last, reverse: bool) -> Tensor:
    states = _of_segments(call, N, call.K, call.V)
    blocks = call.VP // SCANNED_BLOCK
    scan_segments_kernel[(blocks * segments.whole.sequences * call.HV,)](
        M, N, given, states, last, segments.whole.a_row, segments.whole.firsts,
        *constants(call.HV, call.K, call.V),
        KP=call.KP, VP=call.VP, BV=SCANNED_BLOCK, BK=min(call.KP, 32),
        MATRIX=call.erase > 0, REVERSE=reverse, PRECISION=WIDE.precision,
        num_warps=max(4, call.KP // 32),
    )  # fmt: skip
    return states


def _of_segments(call: Call, x: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_empty(call.num_segments, call.HV, rows, columns, dtype=torch.float32)
