"""Flash attention as torch brings it, for 16-bit inputs on a GPU: rows of any lengths, histories and windows.

Sequences lie end to end, each one's keys ending with those of its own queries, so that the kernel's causal mask, which
is aligned at the end, is ours. Where a state has seen less than it has room for, the slots before its first key are
given to a sequence of their own that has no queries: no shape depends on a value, and their gradients are zeros.

The backward sums in a fixed order: torch's own choice is atomics, which give other bits each time. (With 256 channels a
head dq still differs from call to call, in its last bits: torch 2.11 on an H200.)
Source: Dao 2023, arXiv:2307.08691.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

from glade.ops.attention.layout import keys_in_order
from glade.ops.attention.state import AttentionState
from glade.ops.packing import longest_document
from glade.ops.register import differentiable

MAX_HEAD_DIM = 256


def takes(K: int, V: int) -> bool:
    """Whether torch's kernel takes heads of so many channels."""
    return K == V <= MAX_HEAD_DIM and K % 8 == 0


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's kernel takes such inputs."""
    return (
        q.is_cuda
        and _dtype(q, k, v) in (torch.bfloat16, torch.float16)
        and takes(q.shape[3], v.shape[3])
        and min(q.numel(), k.numel()) > 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    state: AttentionState | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """o [B, T, H, K] of `glade.ops.attention.attention`, in v's dtype."""
    B, T = q.shape[:2]
    k, v_seen, P = keys_in_order(k, v, window, state, cu_seqlens)
    starts = torch.arange(B + 1, device=q.device) * T if cu_seqlens is None else cu_seqlens
    key_starts = starts
    if state is not None:
        unseen = (P - state.length).clamp(min=0)
        key_starts = starts + torch.arange(len(starts), device=q.device) * P
        key_starts = key_starts.repeat_interleave(2)[:-1]
        key_starts[1::2] += unseen
        starts = starts.repeat_interleave(2)[:-1]
    dtype = _dtype(q, k, v_seen)
    queries, keys, values = (x.to(dtype).flatten(0, 1) for x in (q, k, v_seen))
    borders = [x.to(torch.int32) for x in (starts, key_starts)]
    (o, *_) = _flash(queries, keys, values, *borders, cu_seqlens, T, P, scale, window)
    return o.view(B, T, *o.shape[1:]).to(v.dtype)


def _dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _longest(cu_seqlens: Tensor | None, T: int) -> int:
    """The most queries of a sequence; any number from there on is right, and costs programs that find nothing to do."""
    return T if cu_seqlens is None else longest_document(cu_seqlens, T)


def _seen(window: int | None) -> dict[str, int]:
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    cu_seqlens: Tensor | None,
    T: int,
    P: int,
    scale: float,
    window: int | None,
) -> list[Tensor]:
    """o, and the logarithms of the softmax's sums."""
    longest = _longest(cu_seqlens, T)
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, key_starts, longest, P + longest, 0.0, window is None, False, scale=scale, **_seen(window)
    )
    return [o, lse]


def _kernel_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    cu_seqlens: Tensor | None,
    T: int,
    P: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    longest = _longest(cu_seqlens, T)
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    with _in_order():
        return torch.ops.aten._flash_attention_backward(
            do.contiguous(), q, k, v, o, lse, starts, key_starts, longest, P + longest,
            0.0, window is None, *no_dropout, scale=scale, **_seen(window),
        )  # fmt: skip


@contextmanager
def _in_order() -> Iterator[None]:
    """torch's algorithms that sum in a fixed order, whatever the caller chose, and no filling of new memory."""
    memory: Any = deterministic  # its setting is a property of the module, which types do not know
    chosen = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(chosen[0], warn_only=chosen[1])
        memory.fill_uninitialized_memory = filled


def _like(q, k, v, starts, key_starts, cu_seqlens, T, P, scale, window):
    return [torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)]


def _gradients_like(do, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    q, k, v, starts, key_starts, cu_seqlens, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, starts, key_starts, cu_seqlens)


def _gradients(backward, ctx, do, *_):
    return *backward(do, *ctx.saved_tensors, *ctx.numbers), *[None] * 7


_flash = differentiable(
    "flash_attention",
    _kernel,
    _kernel_backward,
    like=_like,
    gradients_like=_gradients_like,
    save=_save,
    gradients=_gradients,
    returned=1,
)
