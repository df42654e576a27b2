"""The product's kernels on tiles of rows x channels, in fp32 inside, and their launches as a torch custom op.

y = silu(gate) up         dgate = dy up s (1 + gate (1 - s)),  dup = dy gate s,  s = sigmoid(gate) made again
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from glade.ops.linear_attention.triton.launch import device_of
from glade.ops.short_conv.triton.kernels import sigmoid
from glade.ops.swiglu.register import register

TILE = 2048  # elements of a tile
MAX_CHANNELS = 256  # of a tile


@triton.jit
def tile_of(num_rows, width, R: tl.constexpr, BC: tl.constexpr):
    """A program's rows and columns, and where these are. The last rows are the first: those are what the product before
    wrote last, so that some of them are still in the cache, and the product after begins with what is written last."""
    program, across = tl.num_programs(0) - 1 - tl.program_id(0), tl.cdiv(width, BC)
    rows, columns = program // across * R + tl.arange(0, R), program % across * BC + tl.arange(0, BC)
    return rows, columns, (rows < num_rows)[:, None] & (columns < width)[None, :]


@triton.jit
def swiglu_kernel(x, stride, y, num_rows, width, R: tl.constexpr, BC: tl.constexpr):
    rows, columns, live = tile_of(num_rows, width, R, BC)
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    gate = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + at + width, mask=live, other=0.0).to(tl.float32)
    value = gate * sigmoid(gate) * up
    at_y = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(y + at_y, value.to(y.dtype.element_ty), mask=live)


@triton.jit
def swiglu_backward_kernel(dy, dy_stride, x, stride, dx, num_rows, width, R: tl.constexpr, BC: tl.constexpr):
    rows, columns, live = tile_of(num_rows, width, R, BC)
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    gate = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + at + width, mask=live, other=0.0).to(tl.float32)
    d = tl.load(dy + rows.to(tl.int64)[:, None] * dy_stride + columns[None, :], mask=live, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    at_dx = dx + rows.to(tl.int64)[:, None] * (2 * width) + columns[None, :]
    tl.store(at_dx, (d * up * s * (1 + gate * (1 - s))).to(dx.dtype.element_ty), mask=live)
    tl.store(at_dx + width, (d * gate * s).to(dx.dtype.element_ty), mask=live)


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _cut(num_rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and rows and channels of a tile."""
    BC = min(MAX_CHANNELS, triton.next_power_of_2(width))
    R = TILE // BC
    return (triton.cdiv(num_rows, R) * triton.cdiv(width, BC),), {"R": R, "BC": BC}


def _forward(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    if y.numel() > 0:
        rows = _rows(x)
        grid, cut = _cut(len(rows), width)
        with device_of(x):
            swiglu_kernel[grid](rows, rows.stride(0), y, len(rows), width, **cut)
    return y


def _backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        rows, dy = _rows(x), _rows(dy)
        grid, cut = _cut(*dy.shape)
        with device_of(x):
            swiglu_backward_kernel[grid](dy, dy.stride(0), rows, rows.stride(0), dx, *dy.shape, **cut)
    return dx


swiglu = register("triton", _forward, _backward)
