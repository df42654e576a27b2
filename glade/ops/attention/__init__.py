"""Causal softmax attention: whole rows, sliding windows, histories and packed documents.

    o_t = sum_{s visible to t} softmax_s(score(q_t, k_s)) v_s

q [B, T, H, K], k [B, S, HKV, K], v [B, S, HKV, V]; the softmax is fp32 (fp64 for fp64 inputs), o has v's dtype. A token
sees itself and what came before it in its own sequence; with a window w, itself and the w - 1 before it, in O(T w) time
and O(T + w) memory. It knows nothing of projections; positions enter through `glade.ops.rope`, before the call.

Sources: Vaswani et al. 2017, arXiv:1706.03762; windows as in arXiv:2004.05150, section 3.1; grouped heads
arXiv:2305.13245.
"""

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from glade.errors import BackendError
from glade.ops.attention import fused, reference
from glade.ops.attention.scores import (
    AdditiveWeight,
    Score,
    ScoreWeight,
    attention_scores,
    check_score,
    default_scale,
)
from glade.ops.attention.state import AttentionState, check_no_ring, check_state, empty_state, reserve, write_
from glade.ops.packing import check_cu_seqlens

__all__ = [
    "BACKENDS",
    "AdditiveWeight",
    "AttentionState",
    "attention",
    "attention_scores",
    "attention_step_",
    "empty_state",
    "reserve",
]

BACKENDS: dict[str, Callable[..., tuple[Tensor, AttentionState | None]]] = {
    "reference": reference.attention,
    "torch": fused.attention,
}


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = ...,
    scale: float | None = ...,
    score: Score = ...,
    score_weight: ScoreWeight = ...,
    state: AttentionState | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_state: Literal[True] = ...,
    backend: str = ...,
) -> tuple[Tensor, AttentionState]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = ...,
    scale: float | None = ...,
    score: Score = ...,
    score_weight: ScoreWeight = ...,
    state: AttentionState | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_state: Literal[False],
    backend: str = ...,
) -> tuple[Tensor, None]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    score: Score = "dot",
    score_weight: ScoreWeight = None,
    state: AttentionState | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, AttentionState | None]:
    """Causal attention over the new tokens and, with a state, over those before them.

        o_t = sum_s softmax_s(score(q_t, k_s)) v_s,    s from max(0, t - window + 1) to t in t's own sequence

    Args:
        q:            [B, T, H, K]
        k:            [B, T, HKV, K]   H % HKV == 0; query head j reads key head j // (H // HKV)
        v:            [B, T, HKV, V]
        window:       how many tokens a token sees, itself included; None is all
        scale:        factor of the score; default K ** -0.5, for additive 1
        score:        "dot", "multiplicative" or "additive", see `attention_scores`
        score_weight: what that score function needs; None for dot
        state:        what stands before the first token, B rows (N with cu_seqlens) of any lengths; None is nothing
        cu_seqlens:   [N+1] int        borders of packed documents, B == 1; no token sees across one
        return_state: False leaves out the state after the last token (None in its place); packed documents without a
                      window would pay for it N times the longest document
        backend:      "reference", "torch", or "auto", which is "torch" on every device

    Returns:
        o [B, T, H, V] in v's dtype, and the state after the last token, in the dtype of `state` (of k and v without
        one): with a window a ring of `window` slots, else room for T (the longest document's) tokens more than before;
        k and v themselves where nothing stands before them (clone or `reserve` that before `attention_step_`). `state`
        itself is not changed.

    Raises:
        ValueError: a shape, dtype or value that does not fit. BackendError: an unknown backend.
    """
    _check_inputs(q, k, v, window)
    check_score(q, score, score_weight)
    num_rows = q.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, q.shape[0])
    if state is not None:
        check_state(state, num_rows, k, v, window)
        if window is None and not torch.compiler.is_compiling():
            check_no_ring(state)
    if scale is None:
        scale = default_scale(q, score)
    run = BACKENDS.get("torch" if backend == "auto" else backend)
    if run is None:
        raise BackendError(f"attention has no backend '{backend}'; use 'auto' or one of {sorted(BACKENDS)}")
    return run(q, k, v, window, scale, score, score_weight, state, cu_seqlens, return_state)


def attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: AttentionState,
    window: int | None = None,
    scale: float | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """One token a row of `attention`, for decoding: writes into `state` instead of copying it; not differentiated.

    Args:
        q:      [B, H, K]
        k:      [B, HKV, K]
        v:      [B, HKV, V]
        state:  B rows of any lengths, each with room for one token more (see `reserve`); with a window its ring. On
                the CPU a row's result does not depend on the others, to the bit
        window: how many tokens a token sees, itself included; None is all
        scale:  default K ** -0.5
        slots:  [B] int64, the distinct rows of a larger state that these tokens belong to; None is all, in order

    Returns:
        o [B, H, V] in v's dtype.

    Raises:
        ValueError: a shape or dtype that does not fit, or a row that is full.
    """
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"q, k, v have shapes {[list(x.shape) for x in (q, k, v)]}; give one token a row, [B, H, K]")
    _check_inputs(q[:, None], k[:, None], v[:, None], window)
    with torch.no_grad():
        check_state(state, len(q) if slots is None else len(state.length), k, v, window)
        if slots is not None and slots.shape != q.shape[:1]:
            raise ValueError(f"slots has shape {list(slots.shape)}; give [{len(q)}], the state's row of each token")
        write_(state, k, v, window, slots)
        return fused.attention_step_(q, v, state, q.shape[2] ** -0.5 if scale is None else scale, slots)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    shapes = f"q, k, v have shapes {[list(x.shape) for x in (q, k, v)]}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"{shapes}; give [B, T, H, K], [B, T, HKV, K], [B, T, HKV, V]")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}; B and T must agree, HKV of k and v, K of q and k")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, not a multiple of k's {k.shape[2]} (H % HKV must be 0)")
    if not all(x.is_floating_point() for x in (q, k, v)):
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; give floating-point tensors")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; give at least 1, the token itself, or None for all")
