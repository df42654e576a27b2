"""The launches that cut long sequences with scalar gates into segments: the states at their borders, from which the
passes over states then take each segment as a sequence of its own.

    forward    what each segment does to a state (M, N), then the scan over segments, from the given state
    backward   what each segment adds to a gradient (dN), then the scan from the last segment to the first, with M
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from torch import Tensor

from glade.ops.linear_attention.triton.call import FEW_PROGRAMS, Call
from glade.ops.linear_attention.triton.launch import Segments, constants, strides_of
from glade.ops.linear_attention.triton.launcher import start
from glade.ops.linear_attention.triton.scalar_segments import (
    scalar_backward_segments_kernel,
    scalar_forward_segments_kernel,
)
from glade.ops.linear_attention.triton.segments import blocks_of_both, of_segments, scan_segments


def states_before(call: Call, segments: Segments, k, v, write, initial, final: Tensor, kept: list[Tensor]) -> Tensor:
    """The state before each segment, and into `final` the one after the last."""
    reaches, M = _of_segments_kept(kept)
    N = of_segments(call, v, call.VP, call.KP)
    launch = call.config.forward
    BV = call.value_block(launch, segments.chunks, FEW_PROGRAMS)
    blocks = blocks_of_both(call, BV)
    start(
        scalar_forward_segments_kernel, blocks * segments.chunks.sequences * call.HV,
        k, v, write, *(strides_of(x) for x in (k, v, write)),
        *kept[:4], kept[7], M, N, reaches, *call.along(segments.chunks),
        *constants(call.HV, call.group, call.K, call.V),
        KP=call.KP, VP=call.VP, BV=BV, NUM_BLOCKS=blocks, C=call.chunk,
        GATE=call.gate, ERASE=call.erase, WRITE=call.write, PACKED=call.packed, **call.types,
        STAGES=launch.stages, **launch.options,
    )  # fmt: skip
    return scan_segments(call, segments, M, N, reaches, initial, final, reverse=False)


def gradients_after(call: Call, segments: Segments, do, q, k, scale: float, d_final, d_initial, kept) -> Tensor:
    """The gradient of the state after each segment, and into `d_initial` that of the given one."""
    G, erase_rows, _, A = kept[:4]
    dN = of_segments(call, do, call.VP, call.KP)
    launch = call.config.backward
    BV = call.value_block(launch, segments.chunks, FEW_PROGRAMS)
    start(
        scalar_backward_segments_kernel, call.VP // BV * segments.chunks.sequences * call.HV,
        do, q, k, *(strides_of(x) for x in (q, k)),
        G, erase_rows, A, kept[7], dN, *call.along(segments.chunks), scale,
        *constants(call.HV, call.group, call.K, call.V),
        KP=call.KP, VP=call.VP, BV=BV, C=call.chunk,
        GATE=call.gate, ERASE=call.erase, PACKED=call.packed, **call.types,
        STAGES=launch.stages, **launch.options,
    )  # fmt: skip
    reaches, M = _of_segments_kept(kept)
    return scan_segments(call, segments, M, dN, reaches, d_final, d_initial, reverse=True)


def _of_segments_kept(kept: list[Tensor]) -> tuple[Tensor | None, Tensor]:
    reaches, M = kept[8:]
    return reaches if reaches.numel() > 0 else None, M
