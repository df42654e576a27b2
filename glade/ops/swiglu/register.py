"""Turns a backend's `forward(x) -> y` and `backward(dy, x) -> dx` into one differentiable torch custom op."""

from collections.abc import Callable

import torch
from torch import Tensor

from glade.ops.register import differentiable

Run = Callable[[Tensor], Tensor]


def register(name: str, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """Defines `glade::swiglu_{name}` and its backward, and returns the call behind the contract."""

    def forward_op(x: Tensor) -> Tensor:
        return forward(x)

    def backward_op(dy: Tensor, x: Tensor) -> Tensor:
        return backward(dy, x)

    op = torch.library.custom_op(f"glade::swiglu_{name}", forward_op, mutates_args=())
    d_op = torch.library.custom_op(f"glade::swiglu_{name}_backward", backward_op, mutates_args=())

    @op.register_fake
    def _(x):
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    @d_op.register_fake
    def _(dy, x):
        return x.new_empty(x.shape)

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def gradients(backward, ctx, dy):
        return backward(dy, *ctx.saved_tensors)

    return differentiable(op, d_op, forward, backward, save, gradients)
