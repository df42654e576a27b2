"""Turns a backend's functions into differentiable torch custom ops with fake tensors.

A backend gives plain functions on tensors; neither sees autograd, and `torch.compile` sees neither:

    forward(x, weight, gate, gate_bias, gate_activation, eps, dtype) -> y
    backward(dy, x, weight, gate, gate_bias, gate_activation, eps) -> gradients of x, weight, gate and its bias (empty
        where there was none)

and for the sum before the norm

    add_forward(x, y, weight, eps, dtype) -> the norm of x + y, and x + y
    add_backward(dnormed, dtotal, total, weight, y_dtype, eps) -> gradients of x, y and weight

where `dtotal` is None if nothing came of the sum, and the gradient of y is empty where it is that of x, in one dtype.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from glade.ops.register import differentiable

Run = Callable[..., Tensor]
RunAdd = Callable[..., tuple[Tensor, Tensor]]


def register(name: str, forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, ...]]) -> Run:
    """Defines `glade::rms_norm_{name}` and its backward, and returns the call behind the contract."""

    def like(x, weight, gate, gate_bias, gate_activation, eps, dtype):
        return x.new_empty(x.shape, dtype=dtype)

    def gradients_like(dy, x, weight, gate, gate_bias, gate_activation, eps):
        dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
        dbias = weight.new_empty(0) if gate_bias is None else gate_bias.new_empty(gate_bias.shape)
        return x.new_empty(x.shape), weight.new_empty(weight.shape), dgate, dbias

    def save(ctx, inputs, output):
        x, weight, gate, gate_bias, ctx.gate_activation, ctx.eps, _ = inputs
        ctx.save_for_backward(x, weight, gate, gate_bias)

    def gradients(backward, ctx, dy):
        x, weight, gate, gate_bias = ctx.saved_tensors
        dx, dweight, dgate, dbias = backward(dy, x, weight, gate, gate_bias, ctx.gate_activation, ctx.eps)
        dgate, dbias = None if gate is None else dgate, None if gate_bias is None else dbias
        return dx, dweight, dgate, dbias, None, None, None

    return differentiable(
        f"rms_norm_{name}", forward, backward, like=like, gradients_like=gradients_like, save=save, gradients=gradients
    )


def register_add(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> RunAdd:
    """Defines `glade::add_rms_norm_{name}` and its backward, and returns the call behind the contract."""

    def like(x, y, weight, eps, dtype):
        return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape)

    def gradients_like(dnormed, dtotal, total, weight, y_dtype, eps):
        dy = total.new_empty(0 if y_dtype == total.dtype else total.shape, dtype=y_dtype)
        return total.new_empty(total.shape), dy, weight.new_empty(weight.shape)

    def save(ctx, inputs, output):
        _, y, weight, ctx.eps, _ = inputs
        ctx.y_dtype = y.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], weight)

    def gradients(backward, ctx, dnormed, dtotal):
        total, weight = ctx.saved_tensors
        if dnormed is None:
            dnormed = torch.zeros_like(total)
        dx, dy, dweight = backward(dnormed, dtotal, total, weight, ctx.y_dtype, ctx.eps)
        return dx, dx if ctx.y_dtype == total.dtype else dy, dweight, None, None

    return differentiable(
        f"add_rms_norm_{name}",
        forward,
        backward,
        like=like,
        gradients_like=gradients_like,
        save=save,
        gradients=gradients,
    )
