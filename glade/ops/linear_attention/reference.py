"""The specification: `step()`, and a loop over it. Slow, in plain autograd, any dtype; every backend is held to it."""

import torch
from torch import Tensor

from glade.ops.linear_attention.contract import over_value_heads, per_channel, state_dtype
from glade.ops.packing import document_borders


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    scale: float,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token.

    q, k [B, HV, K]; v [B, HV, V]; g, erase None | [B, HV, K or 1]; write None | [B, HV, V or 1];
    state [B, HV, K, V]. Returns o [B, HV, V] and the new state.
    """
    if g is not None:
        state = state * g.exp().unsqueeze(-1)
    update = v if write is None else write * v
    if erase is not None:
        update = update - torch.einsum("bhk,bhkv->bhv", erase * k, state)
    state = state + torch.einsum("bhk,bhv->bhkv", k, update)
    return scale * torch.einsum("bhk,bhkv->bhv", q, state), state


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`linear_attention`, token by token (document by document when packed).

    Raises:
        ValueError: some g > 0 (a growing state is never meant).
    """
    if g is not None and (g > 0).any():
        raise ValueError(f"g reaches {g.max().item():.4g}; the log decay must be <= 0")
    B, T, HV, V = v.shape
    dtype = state_dtype(v)
    rows = B if cu_seqlens is None else len(cu_seqlens) - 1
    if state is None:
        state = v.new_zeros(rows, HV, q.shape[-1], V, dtype=dtype)
    initial = state
    wide_q, wide_k, wide_v = (over_value_heads(x.to(dtype), HV) for x in (q, k, v))
    g, erase, write = (x if x is None else per_channel(x.to(dtype), 4) for x in (g, erase, write))

    def over(start: int, end: int, S: Tensor) -> tuple[list[Tensor], Tensor]:
        outputs = []
        for t in range(start, end):
            gates = (_at(g, t), _at(erase, t), _at(write, t))
            o, S = step(wide_q[:, t], wide_k[:, t], wide_v[:, t], *gates, scale, S)
            outputs.append(o)
        return outputs, S

    with torch.autocast(v.device.type, enabled=False):
        if cu_seqlens is None:
            outputs, final = over(0, T, initial)
        else:
            borders = document_borders(cu_seqlens, T)
            documents = [over(borders[i], borders[i + 1], initial[i : i + 1]) for i in range(rows)]
            outputs = [o for document, _ in documents for o in document]
            final = torch.cat([S for _, S in documents]) if documents else initial
    o = torch.stack(outputs, dim=1) if outputs else wide_v.new_zeros(B, 0, HV, V)
    return o.to(v.dtype), final.clone() if final is initial else final


def _at(gate: Tensor | None, t: int) -> Tensor | None:
    return None if gate is None else gate[:, t]


def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    scale: float,
    state: Tensor,
    slots: Tensor | None,
) -> Tensor:
    """`linear_attention_step_`: `step` on the given rows of the state, written back."""
    HV, dtype = v.shape[-2], state.dtype
    q, k, wide_v = (over_value_heads(x.to(dtype), HV) for x in (q, k, v))
    g, erase, write = (x if x is None else per_channel(x.to(dtype), 3) for x in (g, erase, write))
    o, new = step(q, k, wide_v, g, erase, write, scale, state if slots is None else state[slots])
    if slots is None:
        state.copy_(new)
    else:
        state[slots] = new
    return o.to(v.dtype)
