"""Backend `cpu`: one pass forward and one backward, which computes the sigmoid again."""

import torch
from torch import Tensor

from glade.ops.native.rows import call, rows_of


def swiglu(x: Tensor) -> Tensor:
    return _forward(x)


@torch.library.custom_op("glade::swiglu_cpu", mutates_args=())
def _forward(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    x = rows_of(x, 2 * width)
    call("swiglu", x[:, :width], x[:, width:], y.view(-1, width), rows=len(x), width=width)
    return y


@_forward.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("glade::swiglu_cpu_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    dx = x.new_empty(x.shape)
    flat, x, dy = dx.view(-1, 2 * width), rows_of(x, 2 * width), rows_of(dy, width)
    matrices = (x[:, :width], x[:, width:], dy, flat[:, :width], flat[:, width:])
    call("swiglu_backward", *matrices, rows=len(x), width=width)
    return dx


@_backward.register_fake
def _(dy, x):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx, dy):
    return _backward(dy, *ctx.saved_tensors)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
