"""A tensor's slices along the last axis, whose gradients come back as one tensor without a copy.

autograd lays the gradients of a split end to end: a copy of all of them, at every split of every layer. Here an op asks
for the room of its input's gradient (`gradient_like`), and is given that slice's place in one tensor for all slices;
what was not written there is copied in. An op that does not ask is right all the same.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class _Room:
    """The gradient of one tensor that was cut, while it is being written."""

    def __init__(self, x: Tensor, sizes: Sequence[int]) -> None:
        self.x = x.detach()  # holds its memory, whose address is how its slices are known
        self.gradient: Tensor | None = None
        self.places = set(pairwise(accumulate(sizes, initial=0)))  # first and end of each slice
        self.given: set[tuple[int, int]] = set()

    def place_of(self, x: Tensor) -> tuple[int, int]:
        first = int(x.storage_offset() - self.x.storage_offset())
        return first, first + x.shape[self.x.dim() - 1 :].numel()

    def cut(self, place: tuple[int, int], sizes: Sequence[int]) -> None:
        """A slice is cut again: its place is that of its parts now, and nobody else's."""
        self.places.remove(place)
        self.places |= set(pairwise(accumulate(sizes, initial=place[0])))

    def write(self, gradients: Sequence[Tensor | None], sizes: Sequence[int], first: int) -> None:
        """Copies in what does not lie there already."""
        for gradient, place in zip(gradients, pairwise(accumulate(sizes, initial=first)), strict=True):
            there = self.slice_of(*place)
            if gradient is None:
                there.zero_()
            elif not same_place(gradient, there):
                there.copy_(gradient)

    def slice_of(self, first: int, end: int) -> Tensor:
        if self.gradient is None:
            self.gradient = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        return self.gradient[..., first:end]


_rooms: WeakValueDictionary[int, _Room] = WeakValueDictionary()
_chosen: dict[tuple, Tensor] = {}  # of `gradients_in`


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *sizes: int):
        ctx.sizes, ctx.room = sizes, _Room(x, sizes)
        _rooms[x.untyped_storage().data_ptr()] = ctx.room
        ctx.set_materialize_grads(False)
        return x.split(sizes, -1)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        room: _Room = ctx.room
        room.write(gradients, ctx.sizes, 0)
        dx, room.gradient = room.gradient, None
        room.given.clear()
        return dx, *[None] * len(ctx.sizes)


class _SplitAgain(torch.autograd.Function):
    """Of a slice: its gradient is made in the room of the whole."""

    @staticmethod
    def forward(ctx, x: Tensor, room: _Room, first: int, *sizes: int):
        ctx.sizes, ctx.room, ctx.first = sizes, room, first
        ctx.set_materialize_grads(False)
        return x.split(sizes, -1)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        room: _Room = ctx.room
        room.write(gradients, ctx.sizes, ctx.first)
        return room.slice_of(ctx.first, ctx.first + sum(ctx.sizes)), None, None, *[None] * len(ctx.sizes)


def same_place(x: Tensor, y: Tensor) -> bool:
    return _place(x) == _place(y)


def _place(x: Tensor) -> tuple:
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def serves(x: Tensor) -> bool:
    """On a CPU a copy costs no more than what Python does here."""
    graded = torch.is_grad_enabled() and x.requires_grad and type(x) is Tensor
    return x.is_cuda and graded and not torch.compiler.is_compiling()


def split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """`x.split(sizes, -1)`; x may be a slice that it has answered itself."""
    if serves(x):
        room = _rooms.get(x.untyped_storage().data_ptr())
        if room is not None and _is_slice(x, room) and (place := room.place_of(x)) in room.places:
            room.cut(place, sizes)
            return _SplitAgain.apply(x, room, place[0], *sizes)
        if room is None and x.is_contiguous():
            return _Split.apply(x, *sizes)
    return x.split(list(sizes), -1)


@contextmanager
def gradients_in(places: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Meanwhile `gradient_like` answers the second of each two tensors for the first, once; an op need not ask."""
    _chosen.update((_place(x), there) for x, there in places)
    try:
        yield
    finally:
        _chosen.clear()


def gradient_like(x: Tensor) -> Tensor:
    """Empty, of x's shape and dtype, for the whole gradient of an op's input x: contiguous, or the place of a slice of
    `split`, seen as x sees its slice. Each slice's place is given once, since the gradients of two ops are added.
    """
    if _chosen and (there := _chosen.pop(_place(x), None)) is not None:
        return there
    room = _rooms.get(x.untyped_storage().data_ptr()) if x.dim() > 1 else None
    place = None if room is None or not _is_slice(x, room) else room.place_of(x)
    if room is None or place not in room.places - room.given:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    room.given.add(place)
    return room.slice_of(*place).view(x.shape)


def _is_slice(x: Tensor, room: _Room) -> bool:
    """Whether x runs through its memory as a slice of the whole does, perhaps with its last axis seen as several."""
    leads = x.shape[: room.x.dim() - 1] == room.x.shape[:-1]
    return leads and x.dtype == room.x.dtype and x.stride() == _strides_in(x, room.x)


def _strides_in(x: Tensor, whole: Tensor) -> tuple[int, ...]:
    """The strides of x if it is a slice of `whole` whose last axis is seen as x's last axes."""
    lead = whole.dim() - 1
    inner = [1]
    for size in reversed(x.shape[lead + 1 :]):
        inner.append(inner[-1] * size)
    return *whole.stride()[:lead], *reversed(inner)
