"""Turns a backend's `forward(x) -> y` and `backward(dy, x) -> dx` into one differentiable torch custom op."""

from collections.abc import Callable

from torch import Tensor

from glade.ops.register import differentiable

Run = Callable[[Tensor], Tensor]


def register(name: str, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """Defines `glade::swiglu_{name}` and its backward, and returns the call behind the contract."""

    def like(x):
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    def gradients_like(dy, x):
        return x.new_empty(x.shape)

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def gradients(backward, ctx, dy):
        return backward(dy, *ctx.saved_tensors)

    return differentiable(
        f"swiglu_{name}", forward, backward, like=like, gradients_like=gradients_like, save=save, gradients=gradients
    )
