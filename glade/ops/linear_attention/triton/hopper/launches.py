"""Which calls the kernels for sm_90 serve, and their launches.

They are written in Gluon, which comes with Triton and says of every warp what it does; it changes from version to
version of Triton, so that they are for those that they were tested with. All other calls take the kernels in Triton.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

from functools import cache

import torch
import triton
from torch import Tensor

from glade.ops.linear_attention.triton.call import Call, token_stride
from glade.ops.linear_attention.triton.configs import PROCESSORS, arch_of
from glade.ops.linear_attention.triton.launch import Chunks, constants, lies_by_tokens
from glade.ops.linear_attention.triton.launcher import KIND, of_tiles, start

VERSIONS = ("3.6.",)  # of Triton, that they were tested with on a GPU
AVAILABLE = triton.__version__.startswith(VERSIONS)
try:
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float32
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from glade.ops.linear_attention.triton.hopper.scalar_keys import hopper_scalar_keys_kernel
    from glade.ops.linear_attention.triton.hopper.scalar_states import (
        hopper_scalar_backward_kernel,
        hopper_scalar_forward_kernel,
    )
    from glade.ops.linear_attention.triton.hopper.vector_keys import hopper_vector_keys_kernel
    from glade.ops.linear_attention.triton.hopper.vector_prepare import hopper_vector_prepare_kernel
    from glade.ops.linear_attention.triton.hopper.vector_span_keys import hopper_vector_span_keys_kernel
    from glade.ops.linear_attention.triton.hopper.vector_states import (
        hopper_vector_backward_kernel,
        hopper_vector_forward_kernel,
    )
except ImportError:
    AVAILABLE = False
else:

    class Tiles(TensorDescriptor):
        """Triton's descriptor without its checks, which take longer than a launch: what fails them is not served."""

        def __init__(self, base: Tensor, shape: list[int], strides: list[int], *tile: int):
            self.base, self.shape, self.strides, self.block_shape = base, shape, strides, tile
            self.layout, self.padding = _layout(base.dtype, *tile), "zero"

    @cache
    def _layout(dtype: torch.dtype, *tile: int) -> NVMMASharedLayout:
        return NVMMASharedLayout.get_default_for(tile, bfloat16 if dtype == torch.bfloat16 else float32)

    KIND[Tiles] = of_tiles

CHUNK = 32
SPAN, KEYS = 2, 32  # of `scalar_keys`: chunks of a program, key channels at a time
VALUES = 64  # channels of a program of the passes: the rows of a product
CHANNELS, SUMMED = 64, 32  # of `vector_keys`: key channels at a time, and value channels that it sums over at a time
MOST_TOKEN_HEADS = 2**29  # places in a tensor are told to TMA in 32 bits, and a state has four rows for a token
# Of 256 threads, which are as many as copy and compute, so that two programs share a processor's 65,536.
OPTIONS = dict(num_warps=4, maxnreg=128)


def serves_scalar_keys(call: Call, *inputs: Tensor) -> bool:
    """Whether a call is for `scalar_keys` here, by its gates, its sizes and what it reads, q, k, v and maybe do: scalar
    gates, write none without an erase, heads of 64 or 128 channels in bf16, whole spans of chunks."""
    gates = call.gate <= 1 and call.write <= call.erase <= 1
    return gates and (call.span, call.keys_block) == (SPAN, KEYS) and _fits(call, inputs)


def serves_scalar_states(call: Call, block: int, *inputs: Tensor) -> bool:
    """The same for the passes over states: where programs are few, Triton's take smaller blocks of value channels."""
    return block == VALUES and serves_scalar_keys(call, *inputs)


def serves_vector_states(call: Call, block: int, *inputs: Tensor | None) -> bool:
    """Whether a call whose decay is a vector is for the passes over states here: v and a vector write, or do."""
    given = tuple(x for x in inputs if x is not None)
    return block == VALUES and call.gate == 2 and _fits(call, given)


def serves_vector_prepare(call: Call, q: Tensor, k: Tensor, g, erase, write) -> bool:
    """Whether a call whose decay is a vector is for `vector_prepare` here."""
    if call.gate != 2 or g.dtype != torch.float32:
        return False
    rows = all(_in_one_row(call, x) for x, kind in ((erase, call.erase), (write, call.write)) if kind == 1)
    return rows and _fits(call, (q, k, erase) if call.erase == 2 else (q, k)) and lies_by_tokens(g)


def serves_vector_keys(call: Call, carried: Tensor | None, q: Tensor, k: Tensor, g, erase, do: Tensor, R) -> bool:
    """Whether a call whose decay is a vector is for `vector_keys` here, with an erase and spans of one chunk, or for
    `vector_span_keys`, without and with spans of two; and without a given state, part of which `carried` is."""
    if call.gate != 2 or call.span != (1 if call.erase else 2) or carried is not None or g.dtype != torch.float32:
        return False
    vectors = (q, k, do, R, erase) if call.erase == 2 else (q, k, do, R)
    return (call.erase != 1 or _in_one_row(call, erase)) and _fits(call, vectors) and lies_by_tokens(g)


def _in_one_row(call: Call, gate: Tensor) -> bool:
    """Whether the tokens of all batch rows of a scalar gate lie one behind the other."""
    return call.B == 1 or gate.stride(0) == call.T * gate.stride(1)


def on_sm_90(x: Tensor) -> bool:
    return AVAILABLE and x.is_cuda and arch_of(x.device) == 90


def _fits(call: Call, inputs: tuple[Tensor, ...]) -> bool:
    return (
        on_sm_90(inputs[0])
        and call.K in (64, 128)
        and call.V in (64, 128)
        and call.chunk == CHUNK
        and not call.packed
        and 0 < call.num_token_heads < MOST_TOKEN_HEADS
        and call.T % (CHUNK * call.span) == 0
        and all(x.dtype == torch.bfloat16 and lies_by_tokens(x) for x in inputs)
    )


def scalar_forward_states(
    call: Call, chunks: Chunks, spans: Chunks, q, k, v, scale, initial, o, final, kept: list[Tensor], keep: bool
) -> None:
    G, erase, write, A, R, S, P = kept[:7]
    of_pass = (
        (_written(call, R, CHUNK, VALUES), _states_in_blocks(call, S), _squares(P)) if keep else (None, None, None)
    )
    start(
        hopper_scalar_forward_kernel, _programs(call, chunks),
        _tokens(q, call.K), _tokens(k, call.K), _tokens(v, VALUES),
        _squares(A) if call.erase else None, *map(_chunks, (G, erase, write)),
        _tokens(o, VALUES), initial, final, *of_pass, *_in_sequences(chunks), *_in_sequences(spans), scale,
        *constants(call.HV, call.group, call.K, call.V),
        BK=KEYS, SPAN=SPAN, GATE=call.gate, WRITE=call.write, ERASE=call.erase, KEEP=keep,
        STAGES=_stages(call, chunks), **OPTIONS,
    )  # fmt: skip


def scalar_backward_states(
    call: Call, chunks: Chunks, spans: Chunks, do, q, k, v, scale, d_final, d_state, dv, d_write, dR, dS,
    kept: list[Tensor],
) -> None:  # fmt: skip
    G, erase, write, A, _, _, P = kept[:7]
    start(
        hopper_scalar_backward_kernel, _programs(call, chunks),
        _tokens(q, call.K), _tokens(k, call.K), _tokens(v, VALUES) if call.write else None, _tokens(do, VALUES),
        _squares(A) if call.erase else None, _squares(P), *map(_chunks, (G, erase, write)),
        d_final, d_state, dv, d_write, dR, _states_in_blocks(call, dS),
        *_in_sequences(chunks), *_in_sequences(spans), call.num_token_heads, scale,
        *constants(call.HV, call.group, call.K, call.V, token_stride(dv)),
        BK=KEYS, SPAN=SPAN, GATE=call.gate, WRITE=call.write, ERASE=call.erase,
        STAGES=_stages(call, chunks), **OPTIONS,
    )  # fmt: skip


def scalar_keys(
    call: Call, spans: Chunks, do, q, k, v, scale, dR, dS, kept: list[Tensor], dq, dk, d_erase, dg
) -> None:  # fmt: skip
    G, erase, _, _, R, S = kept[:6]
    size = CHUNK * SPAN
    start(
        hopper_scalar_keys_kernel, spans.count * call.HV,
        _tokens(do, call.V, size), _written(call, R, size, call.V) or _tokens(v, call.V, size),
        _written(call, dR, size, call.V),
        *(_rows(x, KEYS, call.V, KEYS) for x in (S, dS)),
        _tokens(k, KEYS, size), _tokens(q, KEYS, size), G, erase, dq, dk, d_erase, dg, scale,
        *constants(call.HV, call.group, call.K, token_stride(dq), token_stride(dk)),
        GATE=call.gate, ERASE=call.erase, STAGES=2, **OPTIONS,
    )  # fmt: skip


def vector_prepare(
    call: Call, chunks: Chunks, q, k, g, erase, write, scale, kept: list[Tensor], write_rows
) -> None:  # fmt: skip
    """All but the inverse: A is what is to be inverted, below its diagonal."""
    tiles = chunks.count * call.HV
    Qg, Eg, Kt, decay, P, A = kept[1:7]
    outs = [_rows(x, call.K, CHUNK, CHANNELS) if x.numel() > 0 else None for x in (Qg, Kt, Eg)]
    start(
        hopper_vector_prepare_kernel, min(tiles, 2 * PROCESSORS),
        *(_tokens(x, CHANNELS) for x in (q, k, g)), _tokens(erase, CHANNELS) if call.erase == 2 else None,
        *outs, decay, _squares(P), _squares(A) if call.erase else None,
        *_of_rows(call.erase, erase), *_of_rows(call.write, write), write_rows,
        tiles, scale, *constants(call.HV, call.group, call.K),
        ERASE=call.erase, WRITE=call.write, STAGES=2, **OPTIONS,
    )  # fmt: skip


def vector_forward_states(
    call: Call, chunks: Chunks, spans: Chunks, v, write, write_rows, initial, o, final, kept: list[Tensor], keep: bool
) -> None:
    R, S = kept[7:9]
    start(
        hopper_vector_forward_kernel, _programs(call, chunks),
        _tokens(v, VALUES), _tokens(write, VALUES) if call.write == 2 else _chunks(write_rows), *_prepared(call, kept),
        _tokens(o, VALUES), initial, final,
        _tokens(R, VALUES) if keep and call.changes_values else None,
        _rows(S, call.V, call.K, VALUES) if keep else None,
        *_in_sequences(chunks), *_in_sequences(spans), *constants(call.HV, call.K, call.V),
        SPAN=call.span, ERASE=call.erase > 0, WRITE=call.write, STAGES=_stages(call, chunks), **OPTIONS,
    )  # fmt: skip


def vector_backward_states(
    call: Call, chunks: Chunks, spans: Chunks, do, d_final, dR, dS, kept: list[Tensor]
) -> None:  # fmt: skip
    start(
        hopper_vector_backward_kernel, _programs(call, chunks),
        _tokens(do, VALUES), *_prepared(call, kept), d_final, dR, _rows(dS, call.V, call.K, VALUES),
        *_in_sequences(chunks), *_in_sequences(spans), *constants(call.HV, call.K, call.V, token_stride(dR)),
        SPAN=call.span, ERASE=call.erase > 0, STAGES=_stages(call, chunks), **OPTIONS,
    )  # fmt: skip


def vector_keys(
    call: Call, spans: Chunks, do, q, k, g, erase, scale, kept: list[Tensor], R, dR, dS, dP, dT, dq, dk, dg, d_erase
) -> None:  # fmt: skip
    tiles = spans.count * call.HV
    channels = (_tokens(x, CHANNELS) for x in (q, k, g))
    states = (_rows(x, call.V, CHANNELS, SUMMED) for x in (kept[8], dS))
    numbers = constants(call.HV, call.group, call.K, call.V, token_stride(dq), token_stride(dk))
    if call.erase == 0:
        start(
            hopper_vector_span_keys_kernel, min(tiles, 2 * PROCESSORS),
            _tokens(do, SUMMED), _tokens(R, SUMMED), _rows(dP, 2 * CHUNK, CHUNK, CHUNK), *channels, *states,
            dq, dk, dg, tiles, scale, *numbers, STAGES=2, **OPTIONS,
        )  # fmt: skip
        return
    vector = call.erase == 2
    start(
        hopper_vector_keys_kernel, min(tiles, 2 * PROCESSORS),
        *(_tokens(x, SUMMED) for x in (do, R, dR)), _squares(dP), _squares(dT),
        *channels, _tokens(erase, CHANNELS) if vector else None, *states,
        *_of_rows(call.erase, erase), dq, dk, d_erase, dg,
        tiles, call.num_token_heads, scale, *numbers, ERASE=call.erase, STAGES=3, **OPTIONS,
    )  # fmt: skip


def _programs(call: Call, chunks: Chunks) -> int:
    return call.V // VALUES * chunks.sequences * call.HV


def _stages(call: Call, chunks: Chunks) -> int:
    """Chunks that a pass copies ahead, measured. With two, two programs share a processor where there are so many. Of
    chunks that come with vectors of erase, too, three ahead are faster, though no second program finds room then."""
    if call.gate == 2 and call.erase > 0:
        return 3
    if _programs(call, chunks) > PROCESSORS:
        return 2
    return 4 if call.gate == 2 else 3


def _in_sequences(chunks: Chunks) -> tuple[int, int]:
    """Chunks of a row, and of a sequence."""
    return chunks.a_row, chunks.a_row if chunks.a_sequence is None else chunks.a_sequence


# Tensors as the kernels take them: for copies of tiles to and from shared memory, laid out there for products.


def _tokens(x: Tensor, channels: int, tokens: int = CHUNK) -> "Tiles":
    """Of x [B, T, H, D], by tokens."""
    B, T, H, D = x.shape
    return Tiles(x, [B * T, H * D], [x.stride(1), 1], tokens, channels)


def _rows(x: Tensor, columns: int, *tile: int) -> "Tiles":
    """Of x, which lies in one piece, in rows of `columns`."""
    return Tiles(x, [x.numel() // columns, columns], [columns, 1], *tile)


def _squares(x: Tensor) -> "Tiles":
    return _rows(x, CHUNK, CHUNK, CHUNK)


def _chunks(x: Tensor) -> "Tiles | None":
    """A number for each token of a chunk; None for a gate that is none."""
    return _rows(x, CHUNK, 1, CHUNK) if x.numel() > 0 else None


def _of_rows(kind: int, gate: Tensor) -> tuple:
    """A scalar gate, and its strides by tokens and heads."""
    return (gate, constants(*gate.stride()[1:3])) if kind == 1 else (None, constants(0, 0))


def _written(call: Call, R: Tensor, *tile: int) -> "Tiles | None":
    """R or dR^, by spans; None where nothing is erased."""
    return _rows(R, call.V, *tile) if call.erase else None


def _states_in_blocks(call: Call, S: Tensor) -> "Tiles":
    """The value channels of a program, of all blocks of key channels."""
    block = call.V * KEYS
    return Tiles(S, [S.numel() // block, call.V, KEYS], [block, KEYS, 1], call.K // KEYS, VALUES, KEYS)


def _prepared(call: Call, kept: list[Tensor]) -> tuple:
    """Qg, Eg, Kt, the decay, P and A, of every chunk; None for Eg and A where nothing is erased."""
    Qg, Eg, Kt, decay, P, A = kept[1:7]
    Qg, Eg, Kt = (_rows(x, call.K, CHUNK, call.K) if x.numel() > 0 else None for x in (Qg, Eg, Kt))
    return Qg, Eg, Kt, _rows(decay, call.K, 1, call.K), _squares(P), _squares(A) if call.erase > 0 else None
