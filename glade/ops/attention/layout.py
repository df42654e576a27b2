"""Lays out the keys that a call's queries may see, so that each query's are one interval of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from glade.ops.attention.state import AttentionState, history
from glade.ops.packing import document_borders, document_ids


class Visible(NamedTuple):
    """Query t of a row sees keys first[t] .. last[t], both included."""

    k: Tensor  # [B, S, HKV, K]
    v: Tensor  # [B, S, HKV, V]
    first: Tensor  # [B, T] int64, or [1, T] where all rows are alike
    last: Tensor  # [1, T] int64, a query's own key


def visible_keys(
    k: Tensor, v: Tensor, window: int | None, state: AttentionState | None, cu_seqlens: Tensor | None
) -> Visible:
    """Every sequence's past, P positions from its state, directly before its new keys."""
    past = None if state is None else history(state, window)
    P = 0 if past is None else past[0].shape[1]
    token = torch.arange(k.shape[1], device=k.device)
    if cu_seqlens is None:
        own = token + P
        start = torch.zeros_like(own) if state is None else (P - state.length).clamp(min=0)[:, None]
        if past is not None:
            k, v = (torch.cat([old.to(new.dtype), new], 1) for old, new in zip(past, (k, v), strict=True))
    else:
        document = _checked_document_ids(cu_seqlens, k.shape[1])
        borders = cu_seqlens.to(torch.int64)
        own = token + (document + 1) * P
        start = document * P + borders[document]
        if state is not None and past is not None:
            start = start + (P - state.length).clamp(min=0)[document]
            k, v = (_interleave(old, new, own, borders) for old, new in zip(past, (k, v), strict=True))
    first = start.expand(*start.shape[:-1], len(own)) if window is None else torch.maximum(start, own - window + 1)
    return Visible(k, v, first if first.dim() == 2 else first[None], own[None])


def _interleave(past: Tensor, new: Tensor, own: Tensor, borders: Tensor) -> Tensor:
    """[1, N * P + T, ...]: past [N, P, ...] of each document before its part of new [1, T, ...]; own [T] places new."""
    N, P = past.shape[:2]
    source = torch.empty(N * P + len(own), dtype=torch.int64, device=own.device)
    source[own] = N * P + torch.arange(len(own), device=own.device)
    nth = torch.arange(N * P, device=own.device).view(N, P)
    source[nth + borders[:-1, None]] = nth
    return torch.cat([past.flatten(0, 1).to(new.dtype), new[0]])[source][None]


@torch.library.custom_op("glade::checked_document_ids", mutates_args=())
def _checked_document_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """`document_ids`, after the checks of the borders' values, which tracing could not do."""
    document_borders(cu_seqlens, num_tokens)
    return document_ids(cu_seqlens, num_tokens)


@_checked_document_ids.register_fake
def _(cu_seqlens, num_tokens):
    return cu_seqlens.new_empty(num_tokens, dtype=torch.int64)
