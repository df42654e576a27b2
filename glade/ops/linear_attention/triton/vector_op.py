"""The launches where a gate of keys is a vector: the general case, which serves every kind of gate.

    forward    prepare (a program a chunk), then the pass over states (a program a block of value channels)
    backward   the pass over states, last chunk to first, then values (a program a chunk) and keys (a program a span)

Where sequences are too few for the processors, `vector_split` finds the states at the borders of segments before each
pass over states, which takes segments then.

No program adds to what another writes, so that a call gives the same bits each time.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from glade.ops.linear_attention.triton.call import TRITON_TYPE, Call, sum_of_parts, token_stride
from glade.ops.linear_attention.triton.configs import MULTIPROCESSORS
from glade.ops.linear_attention.triton.hopper import launches as hopper
from glade.ops.linear_attention.triton.keys_backward import keys_backward_kernel
from glade.ops.linear_attention.triton.launch import (
    Chunks,
    chunks_of,
    constants,
    device_of,
    lies_by_tokens,
    strides_of,
    tiles_of,
)
from glade.ops.linear_attention.triton.launcher import start
from glade.ops.linear_attention.triton.prepare import inverse_kernel, prepare_kernel
from glade.ops.linear_attention.triton.segments import what_segments_keep
from glade.ops.linear_attention.triton.states import backward_states_kernel, forward_states_kernel
from glade.ops.linear_attention.triton.values_backward import values_backward_kernel
from glade.ops.linear_attention.triton.vector_keys import vector_keys_kernel
from glade.ops.linear_attention.triton.vector_split import gradients_after, states_before
from glade.ops.parts import gradient_like


def _between_kernels(call: Call, v: Tensor, num_chunks: int, num_spans: int, keep: bool) -> list[Tensor]:
    """Empty: G, Qg, Eg, Kt, decay, P, A, R (as v), S (before each span of chunks), M of each segment; of no elements
    what the gates do not need, G of a vector gate, which is made again, R where it is v, R and S, which only a backward
    reads, unless it is to follow, and M unless sequences are cut."""
    M, C, HV, KP, VP = num_chunks, call.chunk, call.HV, call.KP, call.VP
    low, erased = call.dtype, call.erase > 0
    shapes = [(M, HV, C if call.gate == 1 else 0), (M, HV, C, KP), (M, HV, C, KP if erased else 0), (M, HV, C, KP)]
    shapes += [(M, HV, (0, 1, KP)[call.gate]), (M, HV, C, C), (M, HV, C, C if erased else 0)]
    written = (*v.shape[:3], call.V if keep and call.changes_values else 0)
    shapes += [written, (num_spans, HV, KP, VP if keep else 0)]
    dtypes = [call.sum_dtype, low, low, low, torch.float32, low, low, low, low]
    empty = [v.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return [*empty, what_segments_keep(call, v)]


def forward(q, k, v, g, erase, write, scale, state, cu_seqlens, keep) -> list[Tensor]:
    call = Call(q, v, g, erase, write, cu_seqlens)
    chunks = chunks_of(v, cu_seqlens, call.chunk)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = v.new_empty(chunks.sequences, call.HV, call.K, call.V, dtype=torch.float32)
    spans, segments = call.spans_and_segments(v, cu_seqlens, chunks)
    kept = _between_kernels(call, v, chunks.count, spans.count, keep)
    initial = None if state is None else state.contiguous()
    with device_of(v):
        write_rows = v.new_empty(chunks.count, call.HV, call.chunk if call.write == 1 else 0, dtype=torch.float32)
        _prepare(call, chunks, q, k, g, erase, write, scale, kept, write_rows)
        if segments is None:
            _forward_states(call, chunks, spans, v, write, write_rows, initial, o, final, kept, keep)
        else:
            before = states_before(call, segments, v, write, write_rows, initial, final, kept)
            parts = segments.chunks, segments.spans
            _forward_states(call, *parts, v, write, write_rows, before, o, None, kept, keep)
    return [o, final, *kept] if keep else [o, final]


def _prepare(
    call: Call, chunks: Chunks, q, k, g, erase, write, scale: float, kept: list[Tensor], write_rows: Tensor
) -> None:
    if chunks.count == 0:
        return
    if hopper.serves_vector_prepare(call, q, k, g, erase, write):
        hopper.vector_prepare(call, chunks, q, k, g, erase, write, scale, kept, write_rows)
        if call.erase > 0:
            sizes = dict(C=call.chunk, LEVELS=call.levels)
            start(inverse_kernel, chunks.count * call.HV, kept[6], **sizes, **call.types, num_warps=1)
        return
    launch = call.config.prepare
    # of a vector gate only this kernel reads G
    G = kept[0] if call.gate < 2 else kept[0].new_empty(*kept[3].shape)
    start(
        prepare_kernel, chunks.count * call.HV,
        q, k, g, erase, write, *(strides_of(x) for x in (q, k, g, erase, write)),
        G, *kept[1:7], write_rows, *call.where(chunks), scale,
        *constants(call.HV, call.group, call.K),
        KP=call.KP, BK=min(call.KP, launch.block), C=call.chunk, LEVELS=call.levels,
        GATE=call.gate, ERASE=call.erase, WRITE=call.write, PACKED=call.packed,
        G_TYPE=TRITON_TYPE[call.sum_dtype], **call.types,
        INTERPRETED=not q.is_cuda, **launch.options,
    )  # fmt: skip


def _forward_states(
    call: Call, chunks: Chunks, spans: Chunks, v, write, write_rows, initial, o, final, kept: list[Tensor], keep: bool
) -> None:
    if final is not None and final.numel() == 0:
        return
    launch = call.config.forward
    BV = call.value_block(launch, chunks, MULTIPROCESSORS)
    if hopper.serves_vector_states(call, BV, v, write if call.write == 2 else None):
        hopper.vector_forward_states(call, chunks, spans, v, write, write_rows, initial, o, final, kept, keep)
        return
    _, Qg, Eg, Kt, decay, P, A, R, S, _ = kept
    start(
        forward_states_kernel, call.VP // BV * chunks.sequences * call.HV,
        v, write, *(strides_of(x) for x in (v, write)), write_rows,
        Qg, Eg, Kt, decay, P, A, o, initial, final, R, S, *call.along(chunks), *call.in_sequence(spans),
        *constants(call.HV, call.K, call.V),
        KP=call.KP, VP=call.VP, BV=BV, C=call.chunk, SPAN=call.span,
        GATE=call.gate, ERASE=call.erase, WRITE=call.write,
        INITIAL=initial is not None, KEEP=keep, PACKED=call.packed, **call.types,
        STAGES=launch.stages, **launch.options,
    )  # fmt: skip


def backward(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept) -> list[Tensor]:
    call = Call(q, v, g, erase, write, cu_seqlens)
    chunks = chunks_of(v, cu_seqlens, call.chunk)
    spans, segments = call.spans_and_segments(v, cu_seqlens, chunks)
    do, d_final = do.contiguous(), None if d_final is None else d_final.contiguous()
    dv = gradient_like(v)
    R, dR = (kept[7], torch.empty_like(kept[7])) if call.changes_values else (v, dv)
    dS = torch.empty_like(kept[8])
    size = call.chunk * call.span
    dP, dT = (kept[5].new_empty(spans.count, call.HV, size, size if needed else 0) for needed in (True, call.erase))
    d_state = None if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    d_write = None if write is None else torch.empty_like(write, memory_format=torch.contiguous_format)
    with device_of(v):
        if segments is None:
            initial = None if state is None else state.contiguous()
            carried = _backward_states(call, chunks, spans, do, initial, d_final, d_state, dR, dS, kept)
        else:
            after = gradients_after(call, segments, do, d_final, d_state, kept)
            carried = _backward_states(call, segments.chunks, segments.spans, do, None, after, None, dR, dS, kept)
        _backward_values(call, spans, do, v, write, scale, R, dR, dv, d_write, dP, dT)
        dq, dk, dg, d_erase = _backward_keys(call, spans, do, q, k, g, erase, scale, kept, R, dR, dS, dP, dT, carried)
    return [x for x in (dq, dk, dv, dg, d_erase, d_write, d_state) if x is not None]


def _backward_states(
    call: Call, chunks: Chunks, spans: Chunks, do, initial, d_final, d_state, dR, dS, kept: list[Tensor]
):
    """Answers what kept states lack of rowsum(S dS), by span, head and block of value channels; None: nothing."""
    launch = call.config.backward
    BV = call.value_block(launch, chunks, MULTIPROCESSORS)
    blocks = call.VP // BV
    given = d_state is not None and call.gate > 0
    carried = do.new_zeros(spans.count, call.HV, blocks, call.KP, dtype=torch.float32) if given else None
    programs = blocks * chunks.sequences * call.HV
    if programs == 0:
        return carried
    if d_state is None and hopper.serves_vector_states(call, BV, do):
        hopper.vector_backward_states(call, chunks, spans, do, d_final, dR, dS, kept)
        return carried
    start(
        backward_states_kernel, programs,
        do, *kept[1:7], initial, d_final, d_state, dR, dS, carried, *call.along(chunks), *call.in_sequence(spans),
        *constants(call.HV, call.K, call.V, token_stride(dR)),
        KP=call.KP, VP=call.VP, BV=BV, C=call.chunk, SPAN=call.span,
        GATE=call.gate, ERASE=call.erase, INITIAL=d_state is not None, PACKED=call.packed, **call.types,
        STAGES=launch.stages, **launch.options,
    )  # fmt: skip
    return carried


def _backward_values(call: Call, spans: Chunks, do, v, write, scale, R, dR, dv, d_write, dP, dT) -> None:
    if spans.count == 0:
        return
    launch = call.config.values
    start(
        values_backward_kernel, call.span * spans.count * call.HV,
        v, write, *(strides_of(x) for x in (v, write)),
        do, R, strides_of(R), dR, dv, d_write, dP, dT, *call.where(spans), scale,
        *constants(call.HV, call.V, token_stride(dv)),
        VP=call.VP, BV=min(call.VP, launch.block), C=call.chunk, SPAN=call.span,
        ERASE=call.erase, WRITE=call.write, PACKED=call.packed, **call.types,
        STAGES=launch.stages, **launch.options,
    )  # fmt: skip


def _backward_keys(
    call: Call, spans: Chunks, do, q, k, g, erase, scale, kept: list[Tensor], R, dR, dS, dP, dT, carried
):
    launch = call.config.keys
    in_gluon = hopper.serves_vector_keys(call, carried, q, k, g, erase, do, R)
    BK = hopper.CHANNELS if in_gluon else call.keys_block
    num_blocks = call.KP // BK
    dq, dk = call.gradient_of_keys(q), call.gradient_of_keys(k)
    dg, d_erase = call.gradient_in_parts(g, num_blocks), call.gradient_in_parts(erase, num_blocks)
    if in_gluon:
        hopper.vector_keys(call, spans, do, q, k, g, erase, scale, kept, R, dR, dS, dP, dT, dq, dk, dg, d_erase)
    elif spans.count > 0:
        G, decay, S = kept[0], kept[4], kept[8]
        size = call.chunk * call.span
        launch = launch._replace(warps=min(launch.warps, max(BK, size) // 16 if call.gate == 2 else BK // 16))
        arguments = (
            do, R, strides_of(R), dR, S, dS, dP, dT, carried, dq, dk, d_erase, dg,
            *call.where(spans), call.num_token_heads, scale,
            *constants(call.HV, call.group, call.K, call.V, token_stride(dq), token_stride(dk)),
        )  # fmt: skip
        given = dict(
            KP=call.KP, VP=call.VP, BK=BK, BV=min(call.VP, launch.block_v),
            NUM_CARRIED=0 if carried is None else carried.shape[2], C=size,
            ERASE=call.erase, PACKED=call.packed, **call.types,
            STAGES=launch.stages, **launch.options,
        )  # fmt: skip
        if call.gate == 2:
            start(
                vector_keys_kernel, num_blocks * spans.count * call.HV,
                q, k, g, erase, *(strides_of(x) for x in (q, k, g, erase)),
                *(tiles_of(x.view(-1, call.VP), BK, given["BV"]) for x in (S, dS)),
                *(_tokens_in_order(call, x, size, given["BV"]) for x in (do, R, dR)),
                *arguments, G_TYPE=TRITON_TYPE[call.sum_dtype], **given,
            )  # fmt: skip
        else:
            assert call.span == 1
            start(
                keys_backward_kernel, num_blocks * spans.count * call.HV,
                q, k, erase, *(strides_of(x) for x in (q, k, erase)), G, decay,
                *arguments, GATE=call.gate, **given,
            )  # fmt: skip
    dq, dk = call.over_group(dq, q), call.over_group(dk, k)
    return dq, dk, sum_of_parts(dg, g), sum_of_parts(d_erase, erase)


def kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens) -> list[Tensor]:
    call = Call(q, v, g, erase, write, cu_seqlens)
    return _between_kernels(call, v, *call.counts(v, cu_seqlens), keep=True)


def _tokens_in_order(call: Call, x: Tensor, size: int, BV: int) -> TensorDescriptor | None:
    """Tiles of spans whose tokens come in the order of `tokens_of_columns`, a view of five axes; None where spans are
    not whole, or do not lie one behind the other, or a head has fewer channels than tiles."""
    whole = not call.packed and call.T % size == 0 and call.V == call.VP
    if not whole or not lies_by_tokens(x):
        return None
    token, shape = x.stride(1), (call.B * call.T // size, 2, size // 16, 8, call.HV * call.V)
    return tiles_of(x.as_strided(shape, (size * token, 8 * token, 16 * token, token, 1)), 1, 2, size // 16, 8, BV)
