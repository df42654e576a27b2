"""Lays out the keys that a call's queries may see, so that each query's are one interval of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from glade.ops.attention.state import AttentionState, history
from glade.ops.packing import checked_borders, document_ids, once


class Visible(NamedTuple):
    """Query t of a row sees keys first[t] .. last[t], both included."""

    k: Tensor  # [B, S, HKV, K]
    v: Tensor  # [B, S, HKV, V]
    first: Tensor  # [B, T] int64, or [1, T] where all rows are alike
    last: Tensor  # [1, T] int64, a query's own key


def keys_in_order(
    k: Tensor, v: Tensor, window: int | None, state: AttentionState | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Every sequence's past, P positions from its state, directly before its new keys: k, v and P.

    Where a state has seen fewer than P tokens, the past's first positions have no meaning.
    """
    past = None if state is None else history(state, window)
    if past is None or past[0].shape[1] == 0:
        return k, v, 0
    P = past[0].shape[1]
    if cu_seqlens is None:
        k, v = (torch.cat([old.to(new.dtype), new], 1) for old, new in zip(past, (k, v), strict=True))
    else:
        order = _interleaved(cu_seqlens, P, k.shape[1])
        k, v = (_interleave(old, new, *order) for old, new in zip(past, (k, v), strict=True))
    return k, v, P


def visible_keys(
    k: Tensor, v: Tensor, window: int | None, state: AttentionState | None, cu_seqlens: Tensor | None
) -> Visible:
    """`keys_in_order`, and which of them each query sees."""
    T = k.shape[1]
    k, v, P = keys_in_order(k, v, window, state, cu_seqlens)
    token = torch.arange(T, device=k.device)
    if cu_seqlens is None:
        own = token + P
        start = torch.zeros_like(own) if state is None else (P - state.length).clamp(min=0)[:, None]
    else:
        document = _document_of_tokens(cu_seqlens, T)
        own = token + (document + 1) * P
        start = document * P + cu_seqlens.to(torch.int64)[document]
        if state is not None:
            start = start + (P - state.length).clamp(min=0)[document]
    first = start.expand(*start.shape[:-1], len(own)) if window is None else torch.maximum(start, own - window + 1)
    return Visible(k, v, first if first.dim() == 2 else first[None], own[None])


@once
def _interleaved(cu_seqlens: Tensor, P: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Of N pasts of P positions, end to end, and then the new tokens: which of them stands at each place when every
    document's past stands before it, and the place of each; [N * P + T] both.
    """
    document = _document_of_tokens(cu_seqlens, num_tokens)
    device = document.device
    pasts = torch.arange((len(cu_seqlens) - 1) * P, device=device).view(-1, P) + cu_seqlens[:-1, None]
    place = torch.cat([pasts.flatten(), torch.arange(num_tokens, device=device) + (document + 1) * P])
    source = torch.empty_like(place)
    source[place] = torch.arange(len(place), device=device)
    return source, place


class _Permuted(torch.autograd.Function):
    """x[source] along the first axis, where every row is taken once: the gradient is a permutation too, not a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(source, place)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        source, place = ctx.saved_tensors
        return _Permuted.apply(gradients[0], place, source), None, None


def _interleave(past: Tensor, new: Tensor, source: Tensor, place: Tensor) -> Tensor:
    """[1, N * P + T, ...]: past [N, P, ...] of each document before its part of new [1, T, ...], by `_interleaved`."""
    return _Permuted.apply(torch.cat([past.flatten(0, 1).to(new.dtype), new[0]]), source, place)[None]


def _document_of_tokens(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """`document_ids`, after the checks of the borders' values, which tracing cannot do: it leaves them to an op."""
    return (_checked_op if torch.compiler.is_compiling() else _checked_ids)(cu_seqlens, num_tokens)


def _checked_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    return document_ids(checked_borders(cu_seqlens, num_tokens), num_tokens)


_checked_op = torch.library.custom_op("glade::checked_document_ids", _checked_ids, mutates_args=())


@_checked_op.register_fake
def _(cu_seqlens, num_tokens):
    return cu_seqlens.new_empty(num_tokens, dtype=torch.int64)
