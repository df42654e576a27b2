"""A tensor's slices along the last axis, whose gradients come back as one tensor without a copy.

autograd lays the gradients of a split end to end: a copy of all of them, at every split of every layer. Here an op asks
for the room of its input's gradient (`gradient_like`), and is given that slice's place in one tensor for all slices;
what was not written there is copied in. An op that does not ask is right all the same.
"""

from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class _Room:
    """The gradient of one tensor that was cut, while it is being written."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach()  # holds its memory, whose address is how its slices are known
        self.gradient: Tensor | None = None
        self.given: set[int] = set()

    def slice_of(self, offset: int, width: int) -> Tensor:
        if self.gradient is None:
            self.gradient = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        return self.gradient[..., offset : offset + width]


_rooms: WeakValueDictionary[int, _Room] = WeakValueDictionary()


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *sizes: int):
        ctx.sizes, ctx.room = sizes, _Room(x)
        _rooms[x.untyped_storage().data_ptr()] = ctx.room
        ctx.set_materialize_grads(False)
        return x.split(sizes, -1)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        room: _Room = ctx.room
        offset = 0
        for gradient, width in zip(gradients, ctx.sizes, strict=True):
            there = room.slice_of(offset, width)
            if gradient is None:
                there.zero_()
            elif not _same_place(gradient, there):
                there.copy_(gradient)
            offset += width
        dx, room.gradient = room.gradient, None
        room.given.clear()
        return dx, *[None] * len(ctx.sizes)


def _same_place(x: Tensor, y: Tensor) -> bool:
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) == (y.data_ptr(), y.shape, y.stride(), y.dtype)


def serves(x: Tensor) -> bool:
    """On a CPU a copy costs no more than what Python does here."""
    graded = torch.is_grad_enabled() and x.requires_grad and type(x) is Tensor and x.is_contiguous()
    return x.is_cuda and graded and not torch.compiler.is_compiling()


def split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """`x.split(sizes, -1)`."""
    return _Split.apply(x, *sizes) if serves(x) else x.split(list(sizes), -1)


def gradient_like(x: Tensor) -> Tensor:
    """Empty, of x's shape and dtype, for the whole gradient of an op's input x: contiguous, or the place of a slice of
    `split`, seen as x sees its slice. Each slice's place is given once, since the gradients of two ops are added.
    """
    room = _rooms.get(x.untyped_storage().data_ptr()) if x.dim() > 1 else None
    if room is None or x.dtype != room.x.dtype or x.shape[: room.x.dim() - 1] != room.x.shape[:-1]:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    offset = int(x.storage_offset() - room.x.storage_offset())
    width = x.shape[room.x.dim() - 1 :].numel()
    if x.stride() != _strides_in(x, room.x) or offset + width > room.x.shape[-1] or offset in room.given:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    room.given.add(offset)
    return room.slice_of(offset, width).view(x.shape)


def _strides_in(x: Tensor, whole: Tensor) -> tuple[int, ...]:
    """The strides of x if it is a slice of `whole` whose last axis is seen as x's last axes."""
    lead = whole.dim() - 1
    inner = [1]
    for size in reversed(x.shape[lead + 1 :]):
        inner.append(inner[-1] * size)
    return *whole.stride()[:lead], *reversed(inner)
