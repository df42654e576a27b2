"""A custom op's gradient, and the way around the dispatcher for calls that nothing looks into.

A custom op in Python costs some 100 us a call, which in a small model is more than the arithmetic. So a call with plain
tensors runs the op's own functions under one `torch.autograd.Function`; a compiler, and a tensor of another kind (fake,
meta, a subclass), meet the custom op.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def differentiable(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    like: Callable[..., Any],
    gradients_like: Callable[..., Any],
    save: Callable[..., None],
    gradients: Callable[..., Any],
    returned: int | None = None,
) -> Callable[..., Any]:
    """Defines the custom ops `glade::{name}` and `glade::{name}_backward` and returns the call of the first.

    Args:
        forward, backward: what these run: plain functions, neither of which sees autograd. Their annotations are the
                           ops' schemas; the first argument is a tensor
        like, gradients_like: (the same arguments) -> empty tensors like their answers, for a compiler
        save:      (ctx, inputs, output): keeps what the backward needs
        gradients: (backward, ctx, *grads) -> a gradient for every input, by a call of the backward it is given
        returned:  for a forward that answers a list, how many of it the caller is after; the others are for `save`
    """
    op = torch.library.custom_op(f"glade::{name}", forward, mutates_args=())
    d_op = torch.library.custom_op(f"glade::{name}_backward", backward, mutates_args=())
    op.register_fake(like)
    d_op.register_fake(gradients_like)

    def of_op(ctx, *grads):
        return gradients(d_op, ctx, *(grads if returned is None else grads[0]))

    op.register_autograd(of_op, setup_context=save)

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output if returned is None else tuple(output[:returned])

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            return gradients(backward, ctx, *grads)

    def run(x: Tensor, *others: Any) -> Any:
        plain = type(x) is Tensor and not x.is_meta and not torch.compiler.is_compiling()
        return (Plain.apply if plain else op)(x, *others)

    return run
