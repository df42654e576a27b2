"""Attention as its definition: one document at a time, all its scores and a mask by absolute position."""

import torch
from torch import Tensor

from glade.ops.attention.scores import Score, ScoreWeight, attention_scores
from glade.ops.attention.state import AttentionState
from glade.ops.packing import document_borders


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    score: Score,
    score_weight: ScoreWeight,
    state: AttentionState | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, AttentionState | None]:
    documents = _documents(q, k, v, cu_seqlens)
    capacity = window or max((len(k_new) for _, k_new, _ in documents), default=0)
    if window is None and state is not None:
        capacity += state.k.shape[1]
    outputs, rows = [], []
    for i in range(len(documents)):
        q_new, k_new, v_new = documents[i]
        seen = 0 if state is None else int(state.length[i])
        keys, values, positions = k_new, v_new, torch.arange(seen, seen + len(k_new), device=q.device)
        if state is not None:
            S = state.k.shape[1]
            past = torch.arange(max(0, seen - S), seen, device=q.device)
            slots = past % S if S else past
            keys = torch.cat([state.k[i, slots].to(k.dtype), k_new])
            values = torch.cat([state.v[i, slots].to(v.dtype), v_new])
            positions = torch.cat([past, positions])
        own = positions[len(positions) - len(q_new) :, None]
        hidden = positions > own
        if window is not None:
            hidden |= positions <= own - window
        scores = attention_scores(q_new[None], keys[None], score=score, score_weight=score_weight, scale=scale)
        p = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)[0]  # [H, T, S]
        values_by_head = values.to(p.dtype).repeat_interleave(q.shape[2] // v.shape[2], 1)
        outputs.append(torch.einsum("hts,shv->thv", p, values_by_head).to(v.dtype))
        rows.append((_slots(keys, positions, capacity), _slots(values, positions, capacity), seen + len(k_new)))
    if not documents:
        o = v.new_zeros(*q.shape[:3], v.shape[3])
        empty_k, empty_v = (x.new_zeros(0, capacity, *x.shape[2:]) for x in (k, v))
        return o, AttentionState(empty_k, empty_v, _lengths([], q)) if return_state else None
    o = torch.cat(outputs)[None] if cu_seqlens is not None else torch.stack(outputs)
    keys, values, lengths = zip(*rows, strict=True)
    after = AttentionState(torch.stack(keys), torch.stack(values), _lengths(list(lengths), q))
    return o, after if return_state else None


def _documents(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    if cu_seqlens is None:
        return list(zip(q, k, v, strict=True))
    borders = document_borders(cu_seqlens, q.shape[1])
    spans = [slice(borders[i], borders[i + 1]) for i in range(len(borders) - 1)]
    return [(q[0, span], k[0, span], v[0, span]) for span in spans]


def _slots(x: Tensor, positions: Tensor, capacity: int) -> Tensor:
    """[S, heads, channels]: each position in its slot, later ones over earlier ones, zeros elsewhere."""
    slots = [x.new_zeros(x.shape[1:])] * capacity
    for row, position in zip(x, positions.tolist(), strict=True):
        slots[position % capacity] = row
    return torch.stack(slots) if slots else x[:0]


def _lengths(lengths: list[int], q: Tensor) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int64, device=q.device)
