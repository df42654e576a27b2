"""One recurrence for the whole family of linear mixers, each backend behind the same call.

For every value head, with a state S [K, V] that starts at `state` (zeros if None) and is handed back at the end:

    S' = Diag(exp g_t) S_{t-1}
    S_t = S' - k_t (erase_t * k_t)^T S' + k_t (write_t * v_t)^T
    o_t = scale * S_t^T q_t

The shapes of `g`, `erase` and `write` choose the corner (all 27 combinations work):

    mixer                    g               erase           write
    linear attention         none            none            none
    scalar decay (RetNet)    [B,T,HV]        none            none
    GLA                      [B,T,HV,K]      none            none
    DeltaNet                 none            [B,T,HV]        [B,T,HV]
    Gated DeltaNet           [B,T,HV]        [B,T,HV]        [B,T,HV]
    KDA                      [B,T,HV,K]      [B,T,HV]        [B,T,HV]
    Gated DeltaNet-2, KLA    [B,T,HV,K]      [B,T,HV,K]      [B,T,HV,V]

This package knows nothing of normalisation, gate activations or convolutions: its inputs have one meaning.
Sources: arXiv:2312.06635 (GLA), 2406.06484 (DeltaNet), 2412.06464 (GDN), 2510.26692 (KDA), 2605.22791 (GDN-2).
"""

import torch
from torch import Tensor

from glade.ops.linear_attention.contract import check_call, check_step
from glade.ops.linear_attention.dispatch import available_backends, backend_for
from glade.ops.linear_attention.register import recomputing

__all__ = ["available_backends", "linear_attention", "linear_attention_step_", "recomputing"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences; differentiable in every tensor, the initial state included.

    Args:
        q, k:   [B, T, H, K]. One floating dtype for q, k and v.
        v:      [B, T, HV, V], HV a multiple of H; value head j reads q and k head j // (HV // H)
        g:      None | [B, T, HV] | [B, T, HV, K], natural log of the decay, <= 0 (any size, -1e4 too; not checked
                except by `reference`)
        erase:  None (nothing is erased) | [B, T, HV] | [B, T, HV, K]
        write:  None (ones) | [B, T, HV] | [B, T, HV, V]
        scale:  of the output; K ** -0.5 if None
        state:  [B, HV, K, V] fp32 ([N, HV, K, V] with cu_seqlens); None is zeros
        cu_seqlens: [N + 1] int, borders of packed documents, then B == 1; a state crosses no border
        backend: "auto" (chosen by the tensors' device and dtype and by what is installed, nothing else), or a name
                 of `available_backends()`, which runs exactly that

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state in fp32. State and arithmetic are fp32; fp64 if v is fp64.

    Raises:
        ValueError: shapes or dtypes disagree, or cu_seqlens does not fit. BackendError: `backend` cannot serve this.
    """
    check_call(q, k, v, g, erase, write, state, cu_seqlens)
    chosen = backend_for(backend, v.device, v.dtype)
    return chosen.run(q, k, v, g, erase, write, _scale(scale, q), state, cu_seqlens)


def linear_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    scale: float | None = None,
    state: Tensor,
    slots: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of the recurrence for each row, `state` updated in place: the decode step. No gradients.

    Args:
        q, k: [B, H, K]; v: [B, HV, V]; g, erase, write: None | [B, HV] | [B, HV, K] ([B, HV, V] for write). An extra
              axis of one token, [B, 1, ...], is taken too and handed back.
        state: [B, HV, K, V] fp32, or [S, HV, K, V] with `slots`
        slots: [B] int64, the distinct rows of `state` that these tokens belong to; None is row i for token i

    Returns:
        o [B, HV, V] in v's dtype.

    Raises:
        ValueError: shapes or dtypes disagree. BackendError: `backend` cannot serve this call.
    """
    lengthened = q.dim() == 4
    if lengthened:
        if q.shape[1] != 1:
            raise ValueError(f"q has {q.shape[1]} tokens a row; a step takes one (linear_attention takes more)")
        q, k, v = q.squeeze(1), k.squeeze(1), v.squeeze(1)
        g, erase, write = (x if x is None else x.squeeze(1) for x in (g, erase, write))
    check_step(q, k, v, g, erase, write, state, slots)
    chosen = backend_for(backend, v.device, v.dtype)
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        o = chosen.step_(q, k, v, g, erase, write, _scale(scale, q), state, slots)
    return o.unsqueeze(1) if lengthened else o


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)
