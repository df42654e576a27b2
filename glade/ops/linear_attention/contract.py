"""What a call of linear attention may look like: shape and dtype checks, and the per-value-head canonical form.

Only shapes and dtypes are looked at here, so that a call can be traced; the values of `cu_seqlens` are checked by
the backend, which reads them anyway (`glade.ops.packing.document_borders`).
"""

import torch
from torch import Tensor

from glade.ops.packing import check_cu_seqlens

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state_dtype(v: Tensor) -> torch.dtype:
    """The dtype of the state and of all arithmetic: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def final_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Room for the final state: [B, HV, K, V], or [N, HV, K, V] with cu_seqlens."""
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(rows, v.shape[2], q.shape[3], v.shape[3], dtype=state_dtype(v))


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _check_heads(q, k, v, lead="BT")
    _check_gates(q, v, g, erase, write, lead="BT")
    rows = q.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, q.shape[0])
    if state is not None:
        _check_state(state, q, v, rows)


def check_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    state: Tensor,
    slots: Tensor | None,
) -> None:
    _check_heads(q, k, v, lead="B")
    _check_gates(q, v, g, erase, write, lead="B")
    if slots is not None and (slots.dtype != torch.int64 or slots.shape != q.shape[:1]):
        raise ValueError(
            f"slots is {slots.dtype} {list(slots.shape)}; give int64 [{q.shape[0]}], a state row per token"
        )
    _check_state(state, q, v, q.shape[0] if slots is None else state.shape[0])


def _check_heads(q: Tensor, k: Tensor, v: Tensor, lead: str) -> None:
    rank = len(lead) + 2
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != rank:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must have {rank} axes, {_axes(lead, 'heads, dim')}")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {list(k.shape)} and q {list(q.shape)}; they must be equal")
    if v.shape[:-2] != q.shape[:-2]:
        raise ValueError(
            f"v begins with {list(v.shape[:-2])} and q with {list(q.shape[:-2])}; {_axes(lead)} must agree"
        )
    H, HV = q.shape[-2], v.shape[-2]
    if H == 0 or HV % H:
        raise ValueError(f"v has {HV} heads, not a multiple of q's {H} (HV % H must be 0)")
    if v.dtype not in DTYPES or q.dtype != v.dtype or k.dtype != v.dtype:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one dtype of {allowed}")
    for name, x in (("q", q), ("k", k)):
        if x.device != v.device:
            raise ValueError(f"{name} is on {x.device} and v on {v.device}; put them on one device")


def _check_gates(q: Tensor, v: Tensor, g: Tensor | None, erase: Tensor | None, write: Tensor | None, lead: str) -> None:
    heads = v.shape[:-1]  # [B, T, HV] or [B, HV]
    for name, gate, dim, letter in (("g", g, q.shape[-1], "K"), ("erase", erase, q.shape[-1], "K"),
                                    ("write", write, v.shape[-1], "V")):  # fmt: skip
        if gate is None:
            continue
        if gate.shape != heads and gate.shape != (*heads, dim):
            raise ValueError(
                f"{name} has shape {list(gate.shape)}; give {list(heads)} ({_axes(lead, 'HV')}) "
                f"or {[*heads, dim]} ({_axes(lead, f'HV, {letter}')})"
            )
        if not gate.is_floating_point():
            raise ValueError(f"{name} is {gate.dtype}; give a floating dtype")
        if gate.device != v.device:
            raise ValueError(f"{name} is on {gate.device} and v on {v.device}; put them on one device")


def _check_state(state: Tensor, q: Tensor, v: Tensor, rows: int) -> None:
    expected = (rows, v.shape[-2], q.shape[-1], v.shape[-1])
    if state.shape != expected:
        raise ValueError(f"state has shape {list(state.shape)}; it must be {list(expected)} (rows, HV, K, V)")
    if state.dtype != state_dtype(v):
        raise ValueError(f"state is {state.dtype}; with {v.dtype} inputs it must be {state_dtype(v)}")
    if state.device != v.device:
        raise ValueError(f"state is on {state.device} and v on {v.device}; put them on one device")


def _axes(lead: str, rest: str = "") -> str:
    return "[" + ", ".join([*lead, *([rest] if rest else [])]) + "]"


def over_value_heads(x: Tensor, num_v_heads: int) -> Tensor:
    """[..., H, D] -> [..., HV, D]: head j of the answer is head j // (HV // H), a view when HV == H."""
    group = num_v_heads // x.shape[-2]
    return x if group == 1 else x.repeat_interleave(group, dim=-2)


def per_channel(gate: Tensor | None, num_axes: int) -> Tensor | None:
    """A scalar gate [..., HV] gets a last axis of one, so that it broadcasts over channels."""
    return gate if gate is None or gate.dim() == num_axes else gate.unsqueeze(-1)
