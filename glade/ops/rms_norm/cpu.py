"""Backend `cpu`: one pass forward and one backward, which computes the norm and the gate again."""

import torch
from torch import Tensor

from glade.ops.native.rows import call, rows_of
from glade.ops.rms_norm.register import register, register_add

_KINDS = {"silu": 1, "sigmoid": 2}


def _heads(x: Tensor, gate: Tensor | None) -> int:
    """A row is one norm, or with a gate all heads of a token: so a gate may be a slice of a wider projection."""
    return 1 if gate is None or x.dim() < 2 else x.shape[-2]


def _forward(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_activation: str,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    assert gate_bias is None, "it is added to the gate before"
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
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, gate and its bias, the last two empty where there was none."""
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
    return dx, sums.view(heads, -1).sum(0).to(weight.dtype), dgate, weight.new_empty(0)


rms_norm = register("cpu", _forward, _backward)


def _add_forward(x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    normed, total = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape)
    given = (_flat(x, width), weight.float().contiguous()[None], _flat(y, width))
    answers = (normed.view(-1, width), total.view(-1, width))
    call("add_rms_norm", *given, *answers, rows=x.numel() // max(width, 1), width=width, eps=eps)
    return normed, total


def _add_backward(
    dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, y_dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and weight, that of y empty where it is that of x."""
    width, same = total.shape[-1], y_dtype == total.dtype
    dx = total.new_empty(total.shape)
    dy = total.new_empty(0 if same else total.shape, dtype=y_dtype)
    sums = weight.new_empty(1, width, dtype=torch.float32)
    matrices = (
        *(_flat(total, width), weight.float().contiguous()[None], _flat(dtotal, width), _flat(dnormed, width)),
        *(dx.view(-1, width), None if same else dy.view(-1, width)),
    )
    rows = total.numel() // max(width, 1)
    call("add_rms_norm_backward", *matrices, rows=rows, width=width, eps=eps, sums=sums)
    return dx, dy, sums[0].to(weight.dtype)


add_rms_norm = register_add("cpu", _add_forward, _add_backward)
