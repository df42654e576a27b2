"""Tensors that lie end to end in memory, seen as one: `torch.cat` along the first axis without a copy."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def are_together(tensors: Sequence[Tensor]) -> bool:
    end = tensors[0].data_ptr()
    for x in tensors:
        if x.data_ptr() != end or not x.is_contiguous():
            return False
        end += x.nbytes
    return len({x.untyped_storage().data_ptr() for x in tensors}) == 1


def spanned(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors that lie one after the other, as one. Autograd knows of the first alone."""
    assert are_together(tensors)
    first = tensors[0]
    return first.as_strided((sum(len(x) for x in tensors), *first.shape[1:]), first.stride())


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors: Tensor):
        ctx.sizes = [len(x) for x in tensors]
        return spanned([x.detach() for x in tensors])

    @staticmethod
    def backward(ctx, d: Tensor):
        return d.split(ctx.sizes)


def together(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat(tensors)`; a view where they lie together. Their gradients are views of one tensor either way."""
    plain = all(type(x) in (Tensor, nn.Parameter) and x.dtype == tensors[0].dtype for x in tensors)
    if plain and not torch.compiler.is_compiling() and are_together(tensors):
        return _Together.apply(*tensors)
    return torch.cat(list(tensors))
