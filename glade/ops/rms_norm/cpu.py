"""Backend `cpu`: one pass forward and one backward, which computes the norm and the gate again."""

import torch
from torch import Tensor

from glade.ops.native.rows import call, rows_of
from glade.ops.rms_norm.register import register

_KINDS = {"silu": 1, "sigmoid": 2}


def _heads(x: Tensor, gate: Tensor | None) -> int:
    """A row is one norm, or with a gate all heads of a token: so a gate may be a slice of a wider projection."""
    return 1 if gate is None or x.dim() < 2 else x.shape[-2]


def _forward(
    x: Tensor, weight: Tensor, gate: Tensor | None, gate_activation: str, eps: float, dtype: torch.dtype
) -> Tensor:
    y = x.new_empty(x.shape, dtype=dtype)
    heads = _heads(x, gate)
    width = heads * x.shape[-1]
    matrices = (_flat(x, width), weight.float().contiguous()[None], _flat(gate, width), y.view(-1, width))
    kind = _KINDS[gate_activation]
    call("rms_norm", *matrices, rows=y.numel() // max(width, 1), width=width, heads=heads, kind=kind, eps=eps)
    return y


def _flat(x: Tensor | None, width: int) -> Tensor | None:
    return None if x is None else rows_of(x, width)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, gate_activation: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and gate, the last empty where there was none."""
    heads = _heads(x, gate)
    width = heads * x.shape[-1]
    dx = x.new_empty(x.shape)
    dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    sums = weight.new_empty(1, width, dtype=torch.float32)
    matrices = (
        *(_flat(x, width), weight.float().contiguous()[None], _flat(gate, width), None),
        *(_flat(dy, width), dx.view(-1, width), None if gate is None else dgate.view(-1, width)),
    )
    kind, rows = _KINDS[gate_activation], x.numel() // max(width, 1)
    call("rms_norm_backward", *matrices, rows=rows, width=width, heads=heads, kind=kind, eps=eps, sums=sums)
    return dx, sums.view(heads, -1).sum(0).to(weight.dtype), dgate


rms_norm = register("cpu", _forward, _backward)
