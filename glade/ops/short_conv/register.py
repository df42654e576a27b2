"""Turns a backend's `forward` and `backward` into one differentiable torch custom op with fake tensors.

A backend gives two plain functions on tensors; neither sees autograd, and `torch.compile` sees neither:

    forward(x, weight, bias, state, cu_seqlens, *how) -> y, final state
    backward(dy, dfinal, x, weight, bias, state, cu_seqlens, *how) -> gradients of x, weight, bias, state

with how = activation, l2norm_heads, l2norm_channels. `dfinal` is None where nothing came of the final state. What is
given back for bias and state means nothing where there was none (`no_gradient` then stands for the state's).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from glade.ops.register import differentiable
from glade.ops.short_conv.activation import Activation

Run = Callable[..., tuple[Tensor, Tensor]]


def final_like(x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The final state [N, D, W - 1], not filled in."""
    num_documents = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = x.dtype if state is None else state.dtype
    return x.new_empty(num_documents, x.shape[2], weight.shape[1] - 1, dtype=dtype)


def no_gradient(x: Tensor) -> Tensor:
    """What stands for the gradient of a state that was not given: a custom op cannot answer None."""
    return x.new_empty(0)


def register(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
) -> Run:
    """Defines `glade::short_conv_{name}` and its backward, and returns the call behind the contract."""

    def like(x, weight, bias, state, cu_seqlens, activation, l2norm_heads, l2norm_channels):
        return x.new_empty(x.shape), final_like(x, weight, state, cu_seqlens)

    def gradients_like(dy, dfinal, x, weight, bias, state, cu_seqlens, activation, l2norm_heads, l2norm_channels):
        dbias = weight.new_empty(x.shape[2]) if bias is None else bias.new_empty(bias.shape)
        dstate = no_gradient(x) if state is None else state.new_empty(state.shape)
        return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate

    def save(ctx, inputs, output):
        *tensors, ctx.activation, ctx.l2norm_heads, ctx.l2norm_channels = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def gradients(backward, ctx, dy, dfinal):
        x, weight, bias, state, cu_seqlens = ctx.saved_tensors
        how = (ctx.activation, ctx.l2norm_heads, ctx.l2norm_channels)
        dy = torch.zeros_like(x) if dy is None else dy
        dx, dweight, dbias, dstate = backward(dy, dfinal, x, weight, bias, state, cu_seqlens, *how)
        return dx, dweight, None if bias is None else dbias, None if state is None else dstate, *(None,) * 4

    call = differentiable(
        f"short_conv_{name}",
        forward,
        backward,
        like=like,
        gradients_like=gradients_like,
        save=save,
        gradients=gradients,
    )

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation,
        l2norm_heads: int | None,
        l2norm_channels: int,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return call(x, weight, bias, state, cu_seqlens, activation, l2norm_heads, l2norm_channels)

    return run
