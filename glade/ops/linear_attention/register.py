"""Turns a backend's `forward` and `backward` into one differentiable torch custom op with fake tensors.

A backend gives two plain functions on tensors; neither sees autograd, and `torch.compile` sees neither:

    forward(q, k, v, g, erase, write, scale, state, cu_seqlens, keep) -> [o, final_state, *kept]
    backward(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept) -> gradients in the order of
        q, k, v, g, erase, write, state, for those of them that are given; d_final None is zeros

`keep` says whether `forward` hands over what a backward needs; `kept_like` tells, from shapes alone, what that is.
Inside `recomputing()` nothing is handed over, and the backward calls `forward` again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glade.ops.linear_attention.contract import final_like

Run = Callable[..., tuple[Tensor, Tensor]]

# a plain variable, which a traced call can read
_recompute = False


@contextmanager
def recomputing(on: bool = True) -> Iterator[None]:
    """Calls of `linear_attention` made inside keep their inputs for the backward and nothing else.

    The backward then computes the rest again: the time of a forward more, for the memory of what a chunked backward
    needs (docs/kernels.md has the bytes). It holds for the whole process, so one thread at a time may declare it.
    """
    global _recompute
    before, _recompute = _recompute, on
    try:
        yield
    finally:
        _recompute = before


def _exactly(x: Tensor) -> torch.autocast:
    """The body of a custom op sees its caller's autocast, which would round the fp32 arithmetic within to bf16."""
    return torch.autocast(x.device.type, enabled=False)


def register(
    name: str,
    forward: Callable[..., list[Tensor]],
    backward: Callable[..., list[Tensor]],
    kept_like: Callable[..., list[Tensor]],
) -> Run:
    """Defines `glade::linear_attention_{name}` and its backward, and returns the call behind the contract."""

    def forward_op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        erase: Tensor | None,
        write: Tensor | None,
        scale: float,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        keep: bool,
    ) -> list[Tensor]:
        with _exactly(v):
            return forward(q, k, v, g, erase, write, scale, state, cu_seqlens, keep)

    def backward_op(
        do: Tensor,
        d_final: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        erase: Tensor | None,
        write: Tensor | None,
        scale: float,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        kept: Sequence[Tensor],
    ) -> list[Tensor]:
        with _exactly(v):
            return backward(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, list(kept))

    op = torch.library.custom_op(f"glade::linear_attention_{name}", forward_op, mutates_args=())
    d_op = torch.library.custom_op(f"glade::linear_attention_{name}_backward", backward_op, mutates_args=())

    @op.register_fake
    def _(q, k, v, g, erase, write, scale, state, cu_seqlens, keep):
        kept = kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens) if keep else []
        return [_like(v), final_like(q, v, cu_seqlens), *kept]

    @d_op.register_fake
    def _(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept):
        return [_like(x) for x in (q, k, v, g, erase, write, state) if x is not None]

    op.register_autograd(lambda ctx, grads: _gradients(op, d_op, ctx, grads), setup_context=_save)

    class Eager(torch.autograd.Function):
        """The same without the dispatcher, whose share of a small call is a tenth."""

        @staticmethod
        def forward(ctx, *inputs):
            output = forward_op(*inputs)
            _save(ctx, inputs, output)
            return output[0], output[1]

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            return _gradients(forward_op, backward_op, ctx, grads)

    def run(q, k, v, g, erase, write, scale, state, cu_seqlens):
        keep = (
            not _recompute
            and torch.is_grad_enabled()
            and any(x is not None and x.requires_grad for x in (q, k, v, g, erase, write, state))
        )
        # whatever looks into a call, a compiler or a tensor of another kind, knows the custom op
        eager = type(v) is Tensor and not v.is_meta and not torch.compiler.is_compiling()
        o, final, *_ = (Eager.apply if eager else op)(q, k, v, g, erase, write, scale, state, cu_seqlens, keep)
        return o, final

    return run


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    *tensors, scale, state, cu_seqlens, _ = inputs
    ctx.scale = scale
    # else autograd fills zeros as large as everything that was kept, for gradients that nobody reads
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, state, cu_seqlens, *output[2:])


def _gradients(forward, backward, ctx, grads) -> tuple[Tensor | None, ...]:
    q, k, v, g, erase, write, state, cu_seqlens, *kept = ctx.saved_tensors
    if not kept:
        _, _, *kept = forward(q, k, v, g, erase, write, ctx.scale, state, cu_seqlens, True)
    do, d_final = grads[0], grads[1]
    if do is None:
        do = torch.zeros_like(v)
    gradients = iter(backward(do, d_final, q, k, v, g, erase, write, ctx.scale, state, cu_seqlens, kept))
    dq, dk, dv, dg, d_erase, d_write, d_state = (
        None if x is None else next(gradients) for x in (q, k, v, g, erase, write, state)
    )
    return dq, dk, dv, dg, d_erase, d_write, None, d_state, None, None
