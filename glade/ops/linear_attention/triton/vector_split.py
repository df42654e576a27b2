"""The launches that cut long sequences into segments: the states at their borders, from which the passes over states
then take each segment as a sequence of its own.

    forward    what each segment does to a state (M, N), then the scan over segments, from the given state
    backward   what each segment adds to a gradient (dN), then the scan from the last segment to the first, with M
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from torch import Tensor

from glade.ops.linear_attention.triton.call import Call
from glade.ops.linear_attention.triton.configs import MULTIPROCESSORS
from glade.ops.linear_attention.triton.launch import Segments, constants, strides_of
from glade.ops.linear_attention.triton.launcher import start
from glade.ops.linear_attention.triton.segments import blocks_of_both, of_segments, scan_segments
from glade.ops.linear_attention.triton.vector_segments import backward_segments_kernel, forward_segments_kernel


def states_before(
    call: Call, segments: Segments, v, write, write_rows, initial, final: Tensor, kept: list[Tensor]
) -> Tensor:
    """The state before each segment, and into `final` the one after the last."""
    _, _, Eg, Kt, decay, _, A, _, _, M = kept
    N = of_segments(call, v, call.VP, call.KP)
    launch = call.config.forward
    BV = call.value_block(launch, segments.chunks, MULTIPROCESSORS)
    blocks = blocks_of_both(call, BV)
    start(
        forward_segments_kernel, blocks * segments.chunks.sequences * call.HV,
        v, write, *(strides_of(x) for x in (v, write)), write_rows,
        Eg, Kt, decay, A, M, N, *call.along(segments.chunks),
        *constants(call.HV, call.V),
        KP=call.KP, VP=call.VP, BV=BV, NUM_BLOCKS=blocks, C=call.chunk,
        GATE=call.gate, ERASE=call.erase, WRITE=call.write, PACKED=call.packed, **call.types,
        STAGES=launch.stages, **launch.options,
    )  # fmt: skip
    return scan_segments(call, segments, M, N, None, initial, final, reverse=False)


def gradients_after(call: Call, segments: Segments, do, d_final, d_initial, kept: list[Tensor]) -> Tensor:
    """The gradient of the state after each segment, and into `d_initial` that of the given one."""
    dN = of_segments(call, do, call.VP, call.KP)
    launch = call.config.backward
    BV = call.value_block(launch, segments.chunks, MULTIPROCESSORS)
    start(
        backward_segments_kernel, call.VP // BV * segments.chunks.sequences * call.HV,
        do, *kept[1:7], dN, *call.along(segments.chunks),
        *constants(call.HV, call.V),
        KP=call.KP, VP=call.VP, BV=BV, C=call.chunk,
        GATE=call.gate, ERASE=call.erase, PACKED=call.packed, **call.types,
        STAGES=launch.stages, **launch.options,
    )  # fmt: skip
    return scan_segments(call, segments, kept[9], dN, None, d_final, d_initial, reverse=True)
