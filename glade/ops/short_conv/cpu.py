"""Backend `cpu`: one pass forward and one backward, in which every input is read once; the sums are computed again.

The kernel is native/src/elementwise/short_conv.c. Whatever the number of threads, the bits of the answers are the same.
"""

import struct

import torch
from torch import Tensor

from glade.ops.native import address
from glade.ops.native.rows import library, numbers, rows_of
from glade.ops.packing import document_borders
from glade.ops.short_conv.activation import L2_NORM_EPS
from glade.ops.short_conv.register import final_like, no_gradient, register

# the record ConvCall of src/elementwise/call.h
_CALL = struct.Struct("=9q d q 12q 8q")


def _exact(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    l2norm_heads: int | None,
    l2norm_channels: int,
    *,
    y: Tensor | None = None,
    final: Tensor | None = None,
    dy: Tensor | None = None,
    dfinal: Tensor | None = None,
    gradients: tuple[Tensor | None, ...] = (None, None, None, None),
) -> None:
    """`gradients`: where those of x, state, weight and bias go, the last three fp32; none of them is the forward."""
    B, T, D = x.shape
    borders = None if cu_seqlens is None else torch.tensor(document_borders(cu_seqlens, T), dtype=torch.int64)
    num_documents = B if borders is None else len(borders) - 1
    # named, so that a copy made here lives as long as the call
    matrices = [None if part is None else rows_of(part, D) for part in (x, y, dy, gradients[0])]
    exact = [_exact(part) for part in (weight, bias, state, dfinal)]
    unit = (0, 1) if l2norm_heads is None else (l2norm_channels, l2norm_channels // l2norm_heads)
    record = _CALL.pack(
        *(B * T, D, weight.shape[1], num_documents, T, int(activation == "silu"), *unit, torch.get_num_threads()),
        L2_NORM_EPS,
        address(borders),
        *(number for part in matrices for number in numbers(part)),
        *(address(part) for part in (*exact, final, *gradients[1:])),
    )
    library().call("glade_short_conv", record)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    l2norm_heads: int | None,
    l2norm_channels: int,
) -> tuple[Tensor, Tensor]:
    y, final = x.new_empty(x.shape), final_like(x, weight, state, cu_seqlens)
    exact = final.float()
    _run(x, weight, bias, state, cu_seqlens, activation, l2norm_heads, l2norm_channels, y=y, final=exact)
    return y, final if exact is final else final.copy_(exact)


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    l2norm_heads: int | None,
    l2norm_channels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and state, the last two meaningless where there was none."""
    dx = x.new_empty(x.shape)
    dweight, dbias = weight.new_empty(weight.shape, dtype=torch.float32), weight.new_empty(len(weight)).float()
    dstate = no_gradient(x) if state is None else state.new_empty(state.shape, dtype=torch.float32)
    gradients = (dx, None if state is None else dstate, dweight, dbias)
    how = (activation, l2norm_heads, l2norm_channels)
    _run(x, weight, bias, state, cu_seqlens, *how, dy=dy, dfinal=dfinal, gradients=gradients)
    return (
        dx,
        dweight.to(weight.dtype),
        dbias.to(weight.dtype if bias is None else bias.dtype),
        dstate if state is None else dstate.to(state.dtype),
    )


short_conv = register("cpu", _forward, _backward)
