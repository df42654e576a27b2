"""The launches where decay and erase are scalar or absent.

    forward    prepare (a program a chunk; nothing without gates), then the pass over states
    backward   the pass over states, last chunk to first, with the gradients of v and write, then keys

Where sequences are too few for the processors, `scalar_split` finds the states at the borders of segments before each
pass over states, which takes segments then.

No program adds to what another writes, so that a call gives the same bits each time.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
from torch import Tensor

from glade.ops.linear_attention.triton.call import FEW_PROGRAMS, TRITON_TYPE, Call, sum_of_parts, token_stride
from glade.ops.linear_attention.triton.hopper import launches as hopper
from glade.ops.linear_attention.triton.launch import (
    Chunks,
    chunks_of,
    constants,
    device_of,
    strides_of,
    tiles_of,
)
from glade.ops.linear_attention.triton.launcher import start
from glade.ops.linear_attention.triton.scalar_keys import scalar_keys_kernel
from glade.ops.linear_attention.triton.scalar_prepare import scalar_prepare_kernel
from glade.ops.linear_attention.triton.scalar_split import gradients_after, states_before
from glade.ops.linear_attention.triton.scalar_states import scalar_backward_states_kernel, scalar_forward_states_kernel
from glade.ops.linear_attention.triton.segments import what_segments_keep
from glade.ops.parts import gradient_like


def _between_kernels(call: Call, v: Tensor, num_chunks: int, num_spans: int, keep: bool) -> list[Tensor]:
    """Empty: G, erase, write, A of every chunk, R of each span of chunks, S before it, P, the products of each chunk's
    pairs, what each chunk keeps of a state, and of each segment whether M is anything but zero, and M. Of no elements:
    what the gates do not need; R, S and P, which only a backward reads, unless it is to follow; and the last three
    unless sequences are cut."""
    M, HV, C, KP, VP = num_chunks, call.HV, call.chunk, call.KP, call.VP
    erased = call.erase > 0
    rows = [(M, HV, C if given else 0) for given in (call.gate > 0, erased, call.write == 1)]
    dtypes = [call.sum_dtype, torch.float32, torch.float32]
    tiles = [
        (M, HV, C, C if erased else 0),
        (num_spans, HV, C * call.span, VP if erased and keep else 0),
        (num_spans, HV, VP, KP if keep else 0),
        (M, HV, C, C if keep else 0),
    ]
    shapes, dtypes = rows + tiles, dtypes + [call.dtype] * len(tiles)
    empty = [v.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    fading = v.new_empty(M if call.gate and call.segment else 0, HV, 2, dtype=torch.float32)
    reaches = v.new_empty(call.num_segments if call.gate and erased else 0, HV, dtype=torch.int32)
    return [*empty, fading, reaches, what_segments_keep(call, v)]


def forward(q, k, v, g, erase, write, scale, state, cu_seqlens, keep) -> list[Tensor]:
    call = Call(q, v, g, erase, write, cu_seqlens)
    chunks = chunks_of(v, cu_seqlens, call.chunk)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = v.new_empty(chunks.sequences, call.HV, call.K, call.V, dtype=torch.float32)
    spans, segments = call.spans_and_segments(v, cu_seqlens, chunks)
    kept = _between_kernels(call, v, chunks.count, spans.count, keep)
    initial = None if state is None else state.contiguous()
    with device_of(v):
        _prepare(call, chunks, k, g, erase, write, kept)
        if segments is None:
            _forward_states(call, chunks, spans, q, k, v, write, scale, initial, o, final, kept, keep)
        else:
            before = states_before(call, segments, k, v, write, initial, final, kept)
            _forward_states(call, segments.chunks, segments.spans, q, k, v, write, scale, before, o, None, kept, keep)
    return [o, final, *kept] if keep else [o, final]


def _prepare(call: Call, chunks: Chunks, k, g, erase, write, kept: list[Tensor]) -> None:
    if chunks.count == 0 or not (call.gate or call.erase or call.write == 1):
        return
    launch = call.config.prepare
    start(
        scalar_prepare_kernel, chunks.count * call.HV,
        k, g, erase, write, *(strides_of(x) for x in (k, g, erase, write)),
        *kept[:4], kept[7] if kept[7].numel() > 0 else None, *call.where(chunks),
        *constants(call.HV, call.group, call.K),
        KP=call.KP, BK=min(call.KP, launch.block), C=call.chunk, LEVELS=call.levels,
        GATE=call.gate, ERASE=call.erase, WRITE=call.write, PACKED=call.packed,
        G_TYPE=TRITON_TYPE[call.sum_dtype], **call.types,
        **launch.options,
    )  # fmt: skip


def _forward_states(
    call: Call, chunks: Chunks, spans: Chunks, q, k, v, write, scale, initial, o, final, kept, keep: bool
) -> None:
    if final is not None and final.numel() == 0:
        return
    launch = call.config.forward
    BV = call.value_block(launch, chunks, FEW_PROGRAMS)
    if hopper.serves_scalar_states(call, BV, q, k, v):
        hopper.scalar_forward_states(call, chunks, spans, q, k, v, scale, initial, o, final, kept, keep)
        return
    # of packed documents a tile would reach into the next one
    widths = ((q, call.KP), (k, call.KP), (v, BV))
    tiles = [None if call.packed else tiles_of(x, 1, call.chunk, 1, width) for x, width in widths]
    start(
        scalar_forward_states_kernel, call.VP // BV * chunks.sequences * call.HV,
        q, k, v, write, *(strides_of(x) for x in (q, k, v, write)), *tiles,
        *kept[:4], o, initial, final, *kept[4:7], *call.along(chunks), *call.in_sequence(spans), scale,
        *constants(call.HV, call.group, call.K, call.V),
        KP=call.KP, VP=call.VP, BV=BV, BK=call.keys_block, C=call.chunk, SPAN=call.span,
        GATE=call.gate, ERASE=call.erase, WRITE=call.write,
        INITIAL=initial is not None, KEEP=keep, PACKED=call.packed, **call.types,
        STAGES=launch.stages, **launch.options,
    )  # fmt: skip


def backward(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept) -> list[Tensor]:
    call = Call(q, v, g, erase, write, cu_seqlens)
    chunks = chunks_of(v, cu_seqlens, call.chunk)
    spans, segments = call.spans_and_segments(v, cu_seqlens, chunks)
    do, d_final = do.contiguous(), None if d_final is None else d_final.contiguous()
    dR, dS = torch.empty_like(kept[4]), torch.empty_like(kept[5])
    d_state = None if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    dv = gradient_like(v)
    with device_of(v):
        if segments is None:
            d_write = _backward_states(
                call, chunks, spans, do, q, k, v, write, scale, d_final, d_state, dv, dR, dS, kept
            )
        else:
            after = gradients_after(call, segments, do, q, k, scale, d_final, d_state, kept)
            d_write = _backward_states(
                call, segments.chunks, segments.spans, do, q, k, v, write, scale, after, None, dv, dR, dS, kept
            )
        dq, dk, dg, d_erase = _backward_keys(call, spans, do, q, k, v, g, erase, write, scale, dR, dS, kept)
    return [x for x in (dq, dk, dv, dg, d_erase, d_write, d_state) if x is not None]


def _backward_states(
    call: Call, chunks: Chunks, spans: Chunks, do, q, k, v, write, scale, d_final, d_state, dv, dR, dS, kept
):
    launch = call.config.backward
    BV = call.value_block(launch, chunks, FEW_PROGRAMS)
    blocks = call.VP // BV
    d_write = call.gradient_in_parts(write, call.VP // 16)
    programs = blocks * chunks.sequences * call.HV
    if hopper.serves_scalar_states(call, BV, q, k, v, do):
        hopper.scalar_backward_states(
            call, chunks, spans, do, q, k, v, scale, d_final, d_state, dv, d_write, dR, dS, kept
        )
    elif programs > 0:
        start(
            scalar_backward_states_kernel, programs,
            do, q, k, v, write, *(strides_of(x) for x in (q, k, v, write)),
            *kept[:4], kept[6], d_final, d_state, dv, d_write, dR, dS, *call.along(chunks),
            *call.in_sequence(spans), call.num_token_heads, scale,
            *constants(call.HV, call.group, call.K, call.V, token_stride(dv)),
            KP=call.KP, VP=call.VP, BV=BV, BK=call.keys_block, C=call.chunk, SPAN=call.span,
            GATE=call.gate, ERASE=call.erase, WRITE=call.write,
            INITIAL=d_state is not None, PACKED=call.packed, **call.types,
            STAGES=launch.stages, **launch.options,
        )  # fmt: skip
    return sum_of_parts(d_write, write)


def _backward_keys(call: Call, spans: Chunks, do, q, k, v, g, erase, write, scale, dR, dS, kept: list[Tensor]):
    launch = call.config.keys
    dq, dk = call.gradient_of_keys(q), call.gradient_of_keys(k)
    dg, d_erase = call.gradient_in_parts(g, 1), call.gradient_in_parts(erase, 1)
    if hopper.serves_scalar_keys(call, q, k, v, do):
        hopper.scalar_keys(call, spans, do, q, k, v, scale, dR, dS, kept, dq, dk, d_erase, dg)
    elif spans.count > 0:
        R, S = kept[4:6]
        start(
            scalar_keys_kernel, spans.count * call.HV,
            q, k, v, g, erase, write, *(strides_of(x) for x in (q, k, v, g, erase, write)),
            do, R, dR, S, dS, dq, dk, d_erase, dg,
            *call.where(spans), scale,
            *constants(call.HV, call.group, call.K, call.V, token_stride(dq), token_stride(dk)),
            KP=call.KP, VP=call.VP, BK=call.keys_block, C=call.chunk * call.span,
            GATE=call.gate, ERASE=call.erase, WRITE=call.write, PACKED=call.packed,
            G_TYPE=TRITON_TYPE[call.sum_dtype], **call.types,
            STAGES=launch.stages, **launch.options,
        )  # fmt: skip
    dq, dk = call.over_group(dq, q), call.over_group(dk, k)
    return dq, dk, sum_of_parts(dg, g), sum_of_parts(d_erase, erase)


def kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens) -> list[Tensor]:
    call = Call(q, v, g, erase, write, cu_seqlens)
    return _between_kernels(call, v, *call.counts(v, cu_seqlens), keep=True)
