"""RMSNorm over the last axis, with an optional gate on what it answers.

    y = weight * x / sqrt(mean(x^2) + eps) * act(gate + gate_bias)

One op for the norm of the residual stream and for the gated norm of a mixer's heads, because the gate is read and
multiplied in the same pass over memory. It writes the dtype that the next matrix product reads.

Sources: arXiv:1910.07467; the gate: arXiv:2307.08621, 2412.06464.
"""

from typing import Literal

import torch
from torch import Tensor

from glade.ops.backends import Backend, choose
from glade.ops.native import rows
from glade.ops.rms_norm import cpu, eager, reference, triton

__all__ = ["BACKENDS", "GateActivation", "add_rms_norm", "rms_norm"]

GateActivation = Literal["silu", "sigmoid"]

BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton.rms_norm, triton.refuses),
    "cpu": Backend(cpu.rms_norm, rows.refuses),
    "torch": Backend(eager.rms_norm),
    "reference": Backend(reference.rms_norm, automatic=False),
}


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gate_activation: GateActivation = "silu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), times act(gate + gate_bias) if gated; fp32 inside (fp64 for fp64 inputs).

    Args:
        x:       [..., n]
        weight:  [n]
        gate:    like x, or None
        gate_bias: [heads, n], the last two axes of gate; None is zeros. Here its gradient costs no pass of its own
        gate_activation: "silu" or "sigmoid"
        dtype:   of y, floating-point; None: x's
        backend: "reference", "torch", "cpu" (fp32 and bf16 on the CPU), "triton" (on NVIDIA GPUs), or
                 "auto": the fastest installed

    Returns:
        y like x, in `dtype`.

    Raises:
        ValueError: a shape, dtype or activation that does not fit. BackendError: `backend` cannot serve x.
    """
    _check(x, weight, dtype)
    if gate is not None and (gate.shape != x.shape or not gate.is_floating_point()):
        raise ValueError(f"gate is {gate.dtype} of shape {list(gate.shape)}; give floating-point {list(x.shape)}")
    if gate_bias is not None and gate is None:
        raise ValueError("gate_bias is given and gate is not; give both, or neither")
    if gate is not None and gate_bias is not None and gate_bias.shape != gate.shape[-2:]:
        wanted = list(gate.shape[-2:])
        raise ValueError(f"gate_bias has shape {list(gate_bias.shape)}; give {wanted}, the last two axes of gate")
    if gate_activation not in ("silu", "sigmoid"):
        raise ValueError(f"gate_activation is {gate_activation!r}; give 'silu' or 'sigmoid'")
    dtype = x.dtype if dtype is None else dtype
    dtypes = (x.dtype, dtype, x.dtype if gate is None else gate.dtype)
    chosen = choose("rms_norm", BACKENDS, backend, x.device, *dtypes)
    fused = chosen != "cpu" and (chosen != "triton" or triton.takes_bias(x))
    if gate is not None and gate_bias is not None and not fused:
        gate, gate_bias = gate + gate_bias.to(gate.dtype), None
    return BACKENDS[chosen].run(x, weight, gate, gate_bias, gate_activation, eps, dtype)


def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The residual stream after a branch, and its norm: total = x + y, weight * total / sqrt(mean(total^2) + eps).

    Args:
        x:       [..., n]
        y:       like x
        weight:  [n]
        eps:     as in `rms_norm`, like dtype (of the norm) and backend

    Returns:
        The norm in `dtype`, and the sum in x's; one pass over memory with backends `cpu` and `triton`.

    Raises:
        ValueError: a shape or dtype that does not fit. BackendError: `backend` cannot serve x.
    """
    _check(x, weight, dtype)
    if y.shape != x.shape or not y.is_floating_point():
        raise ValueError(f"y is {y.dtype} of shape {list(y.shape)}; give floating-point {list(x.shape)}")
    dtype = x.dtype if dtype is None else dtype
    chosen = choose("rms_norm", BACKENDS, backend, x.device, x.dtype, dtype, y.dtype)
    if chosen in ("cpu", "triton"):
        return (cpu if chosen == "cpu" else triton).add_rms_norm(x, y, weight, eps, dtype)
    total = (x + y).to(x.dtype)
    return BACKENDS[chosen].run(total, weight, None, None, "silu", eps, dtype), total


def _check(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> None:
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}; give floating-point [..., n]")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {list(weight.shape)}; give [{x.shape[-1]}], one number a channel of x")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; give a floating-point one")
