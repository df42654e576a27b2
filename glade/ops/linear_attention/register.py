"""Turns a backend's `forward` and `backward` into one differentiable torch custom op with fake tensors.

A backend gives two plain functions on tensors; neither sees autograd, and `torch.compile` sees neither:

    forward(q, k, v, g, erase, write, scale, state, cu_seqlens, keep) -> [o, final_state, *kept]
    backward(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept) -> gradients in the order of
        q, k, v, g, erase, write, state, for those of them that are given; d_final None is zeros

`keep` says whether `forward` hands over what a backward needs; `kept_like` tells, from shapes alone, what that is.
Inside `recomputing()` nothing is handed over, and the backward calls `forward` again, for some heads at a time where
there are many tokens: what it needs, and what it computes on the way, is then there for those heads alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from glade.ops.linear_attention.contract import final_like
from glade.ops.parts import gradient_like, gradients_in, same_place
from glade.ops.register import differentiable

Run = Callable[..., tuple[Tensor, Tensor]]

# a plain variable, which a traced call can read
_recompute = False
# bytes of v from which on a backward that recomputes takes a fourth of the heads at a time
MANY_BYTES = 2**26


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


def _exactly(x: Tensor) -> AbstractContextManager:
    """The body of a custom op sees its caller's autocast, which would round the fp32 arithmetic within to bf16."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
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

    def like(q, k, v, g, erase, write, scale, state, cu_seqlens, keep):
        kept = kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens) if keep else []
        return [_like(v), final_like(q, v, cu_seqlens), *kept]

    def gradients_like(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept):
        return [_like(x) for x in (q, k, v, g, erase, write, state) if x is not None]

    def save(ctx, inputs, output):
        *tensors, ctx.scale, state, cu_seqlens, _ = inputs
        # else autograd fills zeros as large as everything that was kept, for gradients that nobody reads
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, state, cu_seqlens, *output[2:])

    def gradients(backward, ctx, do, d_final, *_):
        q, k, v, g, erase, write, state, cu_seqlens, *kept = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(v)
        # traced, the forward is the custom op as the backward is
        again = forward_op if backward is backward_op else getattr(torch.ops.glade, f"linear_attention_{name}")

        def recomputed(do, d_final, q, k, v, g, erase, write, state):
            _, _, *kept = again(q, k, v, g, erase, write, ctx.scale, state, cu_seqlens, True)
            return backward(do, d_final, q, k, v, g, erase, write, ctx.scale, state, cu_seqlens, kept)

        if kept:
            found = backward(do, d_final, q, k, v, g, erase, write, ctx.scale, state, cu_seqlens, kept)
        else:
            found = _by_heads(recomputed, do, d_final, q, k, v, g, erase, write, state)
        found = iter(found)
        dq, dk, dv, dg, d_erase, d_write, d_state = (
            None if x is None else next(found) for x in (q, k, v, g, erase, write, state)
        )
        return dq, dk, dv, dg, d_erase, d_write, None, d_state, None, None

    call = differentiable(
        f"linear_attention_{name}",
        forward_op,
        backward_op,
        like=like,
        gradients_like=gradients_like,
        save=save,
        gradients=gradients,
        returned=2,
    )

    def run(q, k, v, g, erase, write, scale, state, cu_seqlens):
        keep = (
            not _recompute
            and torch.is_grad_enabled()
            and any(x is not None and x.requires_grad for x in (q, k, v, g, erase, write, state))
        )
        o, final, *_ = call(q, k, v, g, erase, write, scale, state, cu_seqlens, keep)
        return o, final

    return run


def _by_heads(
    backward: Callable[..., list[Tensor]], do: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others
) -> list[Tensor]:
    """backward(do, d_final, q, k, v, *others), for groups of heads one after the other where there is much to compute.

    others: g, erase, write [B, T, HV, ...] or None, and state [N, HV, K, V] or None.
    """
    groups = next(n for n in (4, 2, 1) if q.shape[2] % n == 0) if v.numel() * v.element_size() >= MANY_BYTES else 1
    if groups == 1:
        return backward(do, d_final, q, k, v, *others)
    inputs = [q, k, v, *others]
    traced = any(type(x) is not Tensor for x in (q, k, v))
    axes = [2] * (len(inputs) - 1) + [1]  # that of heads

    def group(i: int, x: Tensor | None, axis: int) -> Tensor | None:
        return None if x is None else x.chunk(groups, axis)[i]

    like = [_like if traced else gradient_like] * 3 + [_like] * len(others)
    whole = [None if x is None else empty(x) for x, empty in zip(inputs, like, strict=True)]
    for i in range(groups):
        some = [group(i, x, axis) for x, axis in zip(inputs, axes, strict=True)]
        there = [group(i, x, axis) for x, axis in zip(whole, axes, strict=True)]
        of_qkv = ((x, y) for x, y in zip(some[:3], there[:3], strict=True) if x is not None and y is not None)
        with nullcontext() if traced else gradients_in(of_qkv):
            found = backward(group(i, do, 2), group(i, d_final, 1), *some)
        for x, gradient in zip((x for x in there if x is not None), found, strict=True):
            if traced or not same_place(x, gradient):
                x.copy_(gradient)
        del found, gradient, some  # before the next group needs as much
    return [x for x in whole if x is not None]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
