"""The sigmoid's kernels on tiles of rows x channels, in fp32, and their launches as a torch custom op.

y = 1 / (1 + exp(-x))        dx = dy y (1 - y)
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from glade.ops.linear_attention.triton.launch import device_of
from glade.ops.parts import gradient_like
from glade.ops.register import differentiable
from glade.ops.short_conv.triton.kernels import sigmoid as sigmoid_of

TILE = 2048  # elements of a tile
MAX_CHANNELS = 256  # of a tile


@triton.jit
def sigmoid_kernel(x, stride, y, num_rows, width, R: tl.constexpr, BC: tl.constexpr):
    rows, columns = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * BC + tl.arange(0, BC)
    live = (rows < num_rows)[:, None] & (columns < width)[None, :]
    value = tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=live, other=0.0).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(y + at, sigmoid_of(value).to(y.dtype.element_ty), mask=live)


@triton.jit
def sigmoid_backward_kernel(
    dy, dy_stride, y, dx, dx_stride, num_rows, width, R: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    rows, columns = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * BC + tl.arange(0, BC)
    live = (rows < num_rows)[:, None] & (columns < width)[None, :]
    d = tl.load(dy + rows.to(tl.int64)[:, None] * dy_stride + columns[None, :], mask=live, other=0.0).to(tl.float32)
    s = tl.load(y + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=live, other=0.0).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * dx_stride + columns[None, :]
    tl.store(dx + at, (d * s * (1 - s)).to(dx.dtype.element_ty), mask=live)


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _cut(num_rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and rows and channels of a tile."""
    BC = min(MAX_CHANNELS, triton.next_power_of_2(width))
    R = TILE // BC
    return (triton.cdiv(num_rows, R), triton.cdiv(width, BC)), {"R": R, "BC": BC}


def _forward(x: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() > 0:
        rows = _rows(x)
        grid, cut = _cut(*rows.shape)
        with device_of(x):
            sigmoid_kernel[grid](rows, rows.stride(0), y, *rows.shape, **cut)
    return y


def _backward(dy: Tensor, y: Tensor, x: Tensor) -> Tensor:
    dx = gradient_like(x)
    if y.numel() > 0:
        dy, there = _rows(dy), _rows(dx)
        assert there.data_ptr() == dx.data_ptr(), "the room of a gradient is rows"
        grid, cut = _cut(*dy.shape)
        with device_of(y):
            sigmoid_backward_kernel[grid](dy, dy.stride(0), y, there, there.stride(0), *dy.shape, **cut)
    return dx


def _save(ctx, inputs, output):
    ctx.save_for_backward(output, inputs[0])  # x for the place of its gradient: other slices keep its memory anyway


sigmoid = differentiable(
    "sigmoid_triton",
    _forward,
    _backward,
    like=lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
    gradients_like=lambda dy, y, x: torch.empty_like(x, memory_format=torch.contiguous_format),
    save=_save,
    gradients=lambda backward, ctx, dy: backward(dy, *ctx.saved_tensors),
)
