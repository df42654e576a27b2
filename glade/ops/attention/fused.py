"""Attention by torch's fused kernels where they serve (16 bits on a GPU; whole rows), by intervals everywhere else."""

import torch
import torch.nn.functional as F
from torch import Tensor

from glade.ops.attention import flash
from glade.ops.attention.intervals import interval_attention
from glade.ops.attention.layout import Visible, visible_keys
from glade.ops.attention.scores import AdditiveWeight, Score, ScoreWeight, attention_scores, bilinear
from glade.ops.attention.state import AttentionState, next_state


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
    after = next_state(state, k, v, cu_seqlens, window) if return_state else None
    if isinstance(score_weight, AdditiveWeight):
        o = _dense(q, visible_keys(k, v, window, state, cu_seqlens), scale, score, score_weight)
        return o.to(v.dtype), after
    if score_weight is not None:
        q = bilinear(q, score_weight)
    if flash.serves(q, k, v):
        return flash.attention(q, k, v, window, scale, state, cu_seqlens), after
    whole_rows = state is None and cu_seqlens is None and (window is None or window >= q.shape[1])
    # With K != V torch has no fused kernel on the CPU: it would hold all scores at once.
    if whole_rows and q.shape[3] == v.shape[3]:
        return _whole_rows(q, k, v, scale), after
    seen = visible_keys(k, v, window, state, cu_seqlens)
    return interval_attention(q, seen.k, seen.v, seen.first, seen.last, scale), after


def _whole_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    queries, keys, values = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    # The tensors decide the dtype of the arithmetic, as in every other path; autocast would decide it here alone
    with torch.autocast(q.device.type, enabled=False):
        o = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2).to(v.dtype)


def _dense(q: Tensor, seen: Visible, scale: float, score: Score, weight: ScoreWeight) -> Tensor:
    """All scores at once, for score functions that are there to be understood rather than to be fast."""
    with torch.autocast(q.device.type, enabled=False):
        scores = attention_scores(q, seen.k, score=score, score_weight=weight, scale=scale)
        key = torch.arange(seen.k.shape[1], device=q.device)
        hidden = (key < seen.first[..., None]) | (key > seen.last[..., None])
        p = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), -1)
        return torch.einsum(
            "bhts,bshv->bthv", p, seen.v.to(p.dtype).repeat_interleave(q.shape[2] // seen.v.shape[2], 2)
        )


def attention_step_(q: Tensor, v: Tensor, state: AttentionState, scale: float, slots: Tensor | None) -> Tensor:
    """o [B, H, V] of q [B, H, K] over rows of a state that already hold the new token; v gives o's dtype.

    The query heads of one key head go in as further queries of it, so that keys are read once and never repeated. The
    arithmetic is in the state's dtype, whatever autocast says: converting all the keys would cost more than the step.
    """
    B, H, K = q.shape
    by_key_head = q.reshape(B, state.k.shape[2], -1, K).to(state.k.dtype)
    with torch.autocast(q.device.type, enabled=False):
        step = _step_masked if state.length.is_cuda else _step_by_row
        o = step(by_key_head, state, scale, slots)
    return o.reshape(B, H, -1).to(v.dtype)


def _step_masked(q: Tensor, state: AttentionState, scale: float, slots: Tensor | None) -> Tensor:
    """All rows over all slots: asking a GPU how long the rows are would wait for it at every layer."""
    k, v, length = state if slots is None else (x[slots] for x in state)
    seen = torch.arange(k.shape[1], device=q.device) < length[:, None]
    keys, values = k.transpose(1, 2), v.transpose(1, 2).to(k.dtype)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None], scale=scale)


def _step_by_row(q: Tensor, state: AttentionState, scale: float, slots: Tensor | None) -> Tensor:
    """Each row over its own keys, where they lie: no copy, no mask, and no dependence on how long the others are."""
    rows = range(len(q)) if slots is None else slots.tolist()
    lengths = state.length.clamp(max=state.k.shape[1]).tolist()
    o = q.new_empty(*q.shape[:3], state.v.shape[3])
    for i, row in enumerate(rows):
        keys, values = (x[row, : lengths[row]].transpose(0, 1)[None] for x in state[:2])
        o[i] = F.scaled_dot_product_attention(q[i : i + 1], keys, values.to(keys.dtype), scale=scale)[0]
    return o
