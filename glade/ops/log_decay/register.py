"""Turns a backend's `forward` and `backward` into one differentiable torch custom op with fake tensors.

forward(z, rate, bias, form) -> g, fp32
backward(dg, z, rate, bias, form, of_rate) -> gradients of z, rate and bias, the last meaningless where there was none;
that of rate may be so where `of_rate` says that nobody asks for it
"""

from collections.abc import Callable

import torch
from torch import Tensor

from glade.ops.register import differentiable

Run = Callable[..., Tensor]


def register(name: str, forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Run:
    """Defines `glade::log_decay_{name}` and its backward, and returns the call behind the contract."""

    def like(z, rate, bias, form):
        return z.new_empty(z.shape, dtype=torch.float32)

    def gradients_like(dg, z, rate, bias, form, of_rate):
        dbias = (rate if bias is None else bias).new_empty(rate.shape)
        return z.new_empty(z.shape), rate.new_empty(rate.shape), dbias

    def save(ctx, inputs, output):
        z, rate, bias, ctx.form = inputs
        ctx.save_for_backward(z, rate, bias)

    def gradients(backward, ctx, dg):
        z, rate, bias = ctx.saved_tensors
        of_rate = ctx.needs_input_grad[1]
        dz, drate, dbias = backward(dg, z, rate, bias, ctx.form, of_rate)
        return dz, drate if of_rate else None, None if bias is None else dbias, None

    return differentiable(
        f"log_decay_{name}", forward, backward, like=like, gradients_like=gradients_like, save=save, gradients=gradients
    )
