"""What every launch needs: kinds of gates, strides, the device, and where the chunks of a call lie."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from glade.errors import BackendError
from glade.ops.linear_attention.chunk_layout import max_chunks
from glade.ops.linear_attention.triton.configs import arch_of
from glade.ops.packing import checked_borders, once

MAX_KEY_DIM = 256  # a program holds all key channels of its block of the state


class Chunks(NamedTuple):
    """Chunk m of a call: tokens starts[m] up to ends[m] at most; sequence n has the chunks firsts[n] : firsts[n + 1].

    The tensors are None when sequences are batch rows, of `a_row` chunks each, or segments of them, of `a_sequence`
    chunks each but for a row's last. Packed, `count` is a bound that follows from shapes; chunks that are not used have
    no tokens.
    """

    size: int
    count: int
    sequences: int
    a_row: int
    a_sequence: int | None
    starts: Tensor | None
    ends: Tensor | None
    firsts: Tensor | None


def chunks_of(v: Tensor, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """The chunks of a call, found on the device.

    Raises:
        ValueError: the values of cu_seqlens do not fit (`checked_borders`).
    """
    B, T = v.shape[:2]
    count = max_chunks(B, T, cu_seqlens, size)
    if cu_seqlens is None:
        return Chunks(size, count, B, -(-T // size), None, None, None, None)
    return Chunks(size, count, len(cu_seqlens) - 1, 0, None, *_packed_chunks(cu_seqlens, T, size))


@once
def _packed_chunks(cu_seqlens: Tensor, num_tokens: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`starts`, `ends` and `firsts` of `Chunks`."""
    count = max_chunks(1, num_tokens, cu_seqlens, size)
    borders = checked_borders(cu_seqlens, num_tokens).to(torch.int64)
    lengths = borders[1:] - borders[:-1]
    firsts = torch.nn.functional.pad(((lengths + size - 1) // size).cumsum(0), (1, 0))
    chunk = torch.arange(count, device=borders.device)
    sequence = torch.searchsorted(firsts[1:].contiguous(), chunk, right=True)
    used = sequence < len(lengths)
    sequence = sequence.clamp(max=max(len(lengths) - 1, 0))
    starts = torch.where(used, borders[sequence] + (chunk - firsts[sequence]) * size, 0)
    ends = torch.where(used, borders[sequence + 1], 0)
    return starts.to(torch.int32), ends.to(torch.int32), firsts.to(torch.int32)


class Segments(NamedTuple):
    """Sequences cut into segments, each a whole number of spans of chunks but for a sequence's last."""

    chunks: Chunks  # those of the call, with segments in the place of sequences
    spans: Chunks
    whole: Chunks  # the segments, as the chunks that they are of their sequences


def segments_of(v: Tensor, cu_seqlens: Tensor | None, chunks: Chunks, spans: Chunks, length: int) -> Segments:
    """Segments of `length` chunks."""
    whole = chunks_of(v, cu_seqlens, chunks.size * length)
    by_segments = _by_segments(chunks, whole)
    return Segments(by_segments, by_segments if spans is chunks else _by_segments(spans, whole), whole)


def _by_segments(chunks: Chunks, whole: Chunks) -> Chunks:
    """The same chunks with the segments of `whole` in the place of sequences."""
    length = whole.size // chunks.size
    if chunks.firsts is None or whole.firsts is None:
        return chunks._replace(sequences=whole.count, a_sequence=length)
    segment = torch.arange(whole.count + 1, device=chunks.firsts.device, dtype=torch.int32)
    sequence = torch.searchsorted(whole.firsts[1:], segment, right=True)
    firsts = segment * length + chunks.firsts[sequence] - whole.firsts[sequence] * length
    firsts = torch.minimum(firsts, chunks.firsts[-1])  # those that are not used
    return chunks._replace(sequences=whole.count, firsts=firsts)


def check_key_dim(q: Tensor) -> None:
    if q.shape[-1] > MAX_KEY_DIM:
        raise BackendError(
            f"backend 'triton' takes keys of up to {MAX_KEY_DIM} channels; these have {q.shape[-1]}. Use 'torch'"
        )


def kind_of(gate: Tensor | None, num_axes: int) -> int:
    """0 for none, 1 for scalar, 2 for vector; a vector gate has `num_axes` axes."""
    return 0 if gate is None else 1 + (gate.dim() == num_axes)


@cache
def constants(*numbers: int) -> tuple:
    """Numbers that a kernel is compiled for. A model does not change them, and with them the addresses of a tile are
    one register and fixed distances: without, registers spill."""
    return tuple(map(_constant, numbers))


@cache
def _constant(number: int) -> tl.constexpr:
    """The same object each time: `start` and Triton compare a launch's arguments with those of launches before, and are
    done with an object that is the same."""
    return tl.constexpr(number)


def strides_of(x: Tensor | None) -> tuple:
    """Strides as a kernel takes them: that of the batch a number, the others constants."""
    return () if x is None else _strides(*x.stride())


@cache
def _strides(batch: int, *others: int) -> tuple:
    return (batch, *constants(*others))


def tiles_of(x: Tensor, *tile: int) -> TensorDescriptor | None:
    """x for a kernel that takes tiles of it, of a size an axis, by the processor's own copies of whole tiles: one
    thread asks for all of a tile, and what lies beyond x comes as zeros. None where the kernel has to load row by row:
    before sm_90, and where x does not lie as these copies take it."""
    size, strides = x.element_size(), x.stride()
    aligned = x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in strides[:-1])
    apart = all(stride > 0 for stride in strides)
    fits = x.numel() > 0 and max(x.shape) < 2**31
    if arch_of(x.device) < 90 or not (aligned and apart and fits and strides[-1] == 1):
        return None
    return TensorDescriptor(x, list(x.shape), list(strides), list(tile))


def lies_by_tokens(x: Tensor) -> bool:
    """Whether x [B, T, H, D] is [B T, H D] as it lies, and as copies of whole tiles take it."""
    return _is_by_tokens(x.shape, x.stride(), 16 // x.element_size()) and x.data_ptr() % 16 == 0


@cache
def _is_by_tokens(shape: tuple[int, ...], strides: tuple[int, ...], aligned: int) -> bool:
    B, T, _, D = shape
    row, token, head, channel = strides
    return (row == T * token or B == 1) and (head, channel) == (D, 1) and token > 0 and token % aligned == 0


def device_of(x: Tensor) -> AbstractContextManager:
    """Launches go to the current device, which need not be x's."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
