"""What every launch needs: kinds of gates, strides, the device, and where the chunks of a call lie."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from glade.errors import BackendError
from glade.ops.linear_attention.chunk_layout import max_chunks
from glade.ops.packing import checked_borders, once

MAX_KEY_DIM = 256  # a program holds all key channels of its block of the state


class Chunks(NamedTuple):
    """Chunk m of a call: tokens starts[m] up to ends[m] at most; sequence n has the chunks firsts[n] : firsts[n + 1].

    The tensors are None when sequences are batch rows, of `a_row` chunks each; only `firsts` is given where batch rows
    are cut into segments. Packed, `count` is a bound that follows from shapes; chunks that are not used have no tokens.
    """

    size: int
    count: int
    sequences: int
    a_row: int
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
        return Chunks(size, count, B, -(-T // size), None, None, None)
    return Chunks(size, count, len(cu_seqlens) - 1, 0, *_packed_chunks(cu_seqlens, T, size))


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
    by_segments = _by_segments(chunks, whole, v.device)
    return Segments(by_segments, by_segments if spans is chunks else _by_segments(spans, whole, v.device), whole)


def _by_segments(chunks: Chunks, whole: Chunks, device: torch.device) -> Chunks:
    """The same chunks with the segments of `whole` in the place of sequences."""
    length = whole.size // chunks.size
    segment = torch.arange(whole.count + 1, device=device, dtype=torch.int32)
    firsts = segment * length
    if chunks.firsts is not None and whole.firsts is not None:
        sequence = torch.searchsorted(whole.firsts[1:], segment, right=True)
        firsts += chunks.firsts[sequence] - whole.firsts[sequence] * length
        firsts = torch.minimum(firsts, chunks.firsts[-1])  # those that are not used
    elif chunks.a_row != whole.a_row * length:
        firsts += segment // whole.a_row * (chunks.a_row - whole.a_row * length)
    return chunks._replace(sequences=whole.count, firsts=firsts)


def check_key_dim(q: Tensor) -> None:
    if q.shape[-1] > MAX_KEY_DIM:
        raise BackendError(
            f"backend 'triton' takes keys of up to {MAX_KEY_DIM} channels; these have {q.shape[-1]}. Use 'torch'"
        )


def kind_of(gate: Tensor | None, num_axes: int) -> int:
    """0 for none, 1 for scalar, 2 for vector; a vector gate has `num_axes` axes."""
    return 0 if gate is None else 1 + (gate.dim() == num_axes)


def constants(*numbers: int) -> tuple:
    """Numbers that a kernel is compiled for. A model does not change them, and with them the addresses of a tile are
    one register and fixed distances: without, registers spill."""
    return tuple(map(_constant, numbers))


@cache
def _constant(number: int) -> tl.constexpr:
    """The same object each time: Triton compares a launch's arguments with those of launches before, and is done with
    an object that is the same."""
    return tl.constexpr(number)


def strides_of(x: Tensor | None) -> tuple:
    """Strides as a kernel takes them: that of the batch a number, the others constants."""
    return () if x is None else (x.stride(0), *constants(*x.stride()[1:]))


def device_of(x: Tensor) -> AbstractContextManager:
    """Launches go to the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
