"""Packed documents: what `cu_seqlens` means, checked and translated in one place.

`cu_seqlens` [N + 1] holds the borders of N documents laid end to end in one row of T tokens (batch size 1):
document i is tokens cu_seqlens[i] : cu_seqlens[i + 1]. It starts at 0, never falls, and ends at T. A document may
be empty.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Answer = TypeVar("Answer")


def once(ask: Callable[..., Answer]) -> Callable[..., Answer]:
    """`ask(cu_seqlens, *numbers)`, once for each version of a tensor: all layers of a model share the answer.

    Not where a compiler looks on, which would see the first call only, nor while a CUDA graph is recorded, which would
    read what may be gone by then, unless `asked_once_a_recording`.
    """
    answers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> its version, and an answer by numbers

    @wraps(ask)
    def known_or_asked(cu_seqlens: Tensor, *numbers: int) -> Answer:
        if torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor or cu_seqlens.is_inference():
            return ask(cu_seqlens, *numbers)
        if cu_seqlens.is_cuda and not _answers_are_recorded and torch.cuda.is_current_stream_capturing():
            return ask(cu_seqlens, *numbers)
        version, known = answers.get(cu_seqlens) or (None, {})
        if version != cu_seqlens._version:
            known = {}
            answers[cu_seqlens] = cu_seqlens._version, known
        if numbers not in known:
            with torch.inference_mode(False):  # else nothing could be trained with what is kept
                known[numbers] = ask(cu_seqlens, *numbers)
        return known[numbers]

    return known_or_asked


# a plain variable, which the thread of a backward reads too
_answers_are_recorded = False


@contextmanager
def asked_once_a_recording() -> Iterator[None]:
    """While inside, CUDA graphs are recorded of which each replay begins by finding the answers of `once` anew, in the
    place where the others read them: graphs of one memory pool, of tensors that nothing else is asked about.
    """
    global _answers_are_recorded
    before, _answers_are_recorded = _answers_are_recorded, True
    try:
        yield
    finally:
        _answers_are_recorded = before


_longest: WeakIdKeyDictionary = WeakIdKeyDictionary()


def declare_longest(cu_seqlens: Tensor, num_tokens: int) -> None:
    """No document of `cu_seqlens` is longer than this, whatever else is written there: `longest_document` says so."""
    _longest[cu_seqlens] = num_tokens


def check_cu_seqlens(cu_seqlens: Tensor, batch: int) -> int:
    """The number of documents N, after the checks that need no value of the tensor (so that tracing can do them).

    Raises:
        ValueError: it is not a one-dimensional integer tensor, or the batch is not 1.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 1:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}; give int32 or int64 [N + 1]"
        )
    if batch != 1:
        raise ValueError(
            f"cu_seqlens packs documents into one row, but the batch is {batch}; reshape to [1, B * T, ...]"
        )
    return len(cu_seqlens) - 1


def document_borders(cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """The borders as Python numbers, after the checks that need their values (one look at a device).

    Raises:
        ValueError: it does not start at 0, falls somewhere, or does not end at `num_tokens`.
    """
    return list(_checked_borders(cu_seqlens, num_tokens))


@once
def _checked_borders(cu_seqlens: Tensor, num_tokens: int) -> tuple[int, ...]:
    borders = tuple(cu_seqlens.tolist())
    if borders[0] != 0 or borders[-1] != num_tokens:
        raise ValueError(f"cu_seqlens runs from {borders[0]} to {borders[-1]}; it must run from 0 to T = {num_tokens}")
    for i in range(len(borders) - 1):
        if borders[i + 1] < borders[i]:
            raise ValueError(f"cu_seqlens falls from {borders[i]} to {borders[i + 1]} at document {i}; it may not fall")
    return borders


def checked_borders(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """cu_seqlens after a look at its values.

    A look waits for the device, which a CUDA graph cannot record; while one is recorded, nothing is looked at and
    borders are only held to 0 ... T, so that no program leaves its tensors.

    Raises:
        ValueError: the values do not fit.
    """
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return cu_seqlens.clamp(0, num_tokens).cummax(0).values
    document_borders(cu_seqlens, num_tokens)
    return cu_seqlens


def longest_document(cu_seqlens: Tensor, num_tokens: int) -> int:
    """The most tokens of a document: a number that depends on values, so that tracing stops at it. Where a bound was
    declared, or a CUDA graph is recorded and nothing may be read, it is that bound, or all tokens."""
    if torch.compiler.is_compiling():
        return int(cu_seqlens.diff().max())
    declared = _longest.get(cu_seqlens)
    if declared is not None:
        return min(declared, num_tokens)
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return num_tokens
    borders = document_borders(cu_seqlens, num_tokens)
    return max(borders[i + 1] - borders[i] for i in range(len(borders) - 1))


@once
def document_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] int64: which document each token belongs to."""
    ends = cu_seqlens[1:].to(torch.int64)
    return torch.searchsorted(ends, torch.arange(num_tokens, device=ends.device), right=True)


@once
def document_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] int64: how many tokens of its own document stand before each token."""
    starts = cu_seqlens.to(torch.int64)[document_ids(cu_seqlens, num_tokens)]
    return torch.arange(num_tokens, device=starts.device) - starts


def token_positions(num_tokens: int, device: torch.device, seen: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """[T] or [B, T] int64: how many tokens of its own sequence stand before each token.

    `seen` is what each row (each document) had read before, [B] or [N]; None is nothing.
    """
    if cu_seqlens is None:
        positions = torch.arange(num_tokens, device=device)
        return positions if seen is None else seen[:, None] + positions
    positions = document_positions(cu_seqlens, num_tokens)
    return positions if seen is None else positions + seen[document_ids(cu_seqlens, num_tokens)]


def tokens_seen(x: Tensor, seen: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """[B] or [N] int64: what each row has read after the tokens of x [B, T, ...]."""
    if cu_seqlens is None:
        read = torch.full(x.shape[:1], x.shape[1], dtype=torch.int64, device=x.device)
    else:
        read = cu_seqlens.diff().to(torch.int64)
    return read if seen is None else seen + read


def rounded_up(n: int, sizes: int) -> int:
    """n, or the next of `sizes` (a power of two) evenly spaced numbers from one power of two to the next."""
    step = 1 << max(0, n.bit_length() - sizes.bit_length())
    return -(-n // step) * step
