"""The rotation's kernel on tiles of tokens x pairs, a token's heads one after another, and its launch as a torch custom
op. The gradient is turned back by the same angle: the same kernel.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from glade.ops.linear_attention.triton.launch import device_of
from glade.ops.register import differentiable
from glade.ops.rope import eager

TOKENS = 8  # of a tile


@triton.jit
def rope_kernel(
    x, x_row, x_token, x_head, y, positions, frequencies, num_rows, T, sign,
    H, K, ONE_ROW: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BREST: tl.constexpr,
):  # fmt: skip
    rows, pairs = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, BP)
    live = rows < num_rows
    position = tl.load(positions + (rows % T if ONE_ROW else rows), mask=live, other=0).to(tl.float32)
    frequency = tl.load(frequencies + pairs, mask=pairs < HALF, other=0.0)
    angle = position[:, None] * frequency[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle) * sign
    inside = live[:, None] & (pairs < HALF)[None, :]
    from_token = (rows // T).to(tl.int64) * x_row + (rows % T).to(tl.int64) * x_token
    to_token = rows.to(tl.int64) * H * K
    for head in range(H):
        source = x + (from_token + head * x_head)[:, None]
        target = y + (to_token + head * K)[:, None]
        low = tl.load(source + pairs[None, :], mask=inside, other=0.0).to(tl.float32)
        high = tl.load(source + HALF + pairs[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(target + pairs[None, :], (low * cos - high * sin).to(y.dtype.element_ty), mask=inside)
        tl.store(target + HALF + pairs[None, :], (high * cos + low * sin).to(y.dtype.element_ty), mask=inside)
        if BREST > 0:
            channels = 2 * HALF + tl.arange(0, BREST)
            left = live[:, None] & (channels < K)[None, :]
            tl.store(target + channels[None, :], tl.load(source + channels[None, :], mask=left), mask=left)


@cache
def _frequencies(theta: float, dims: int, device: torch.device) -> Tensor:
    return eager.frequencies(theta, dims, device, torch.float64).float()


def _turned(x: Tensor, positions: Tensor, theta: float, dims: int, sign: float) -> Tensor:
    B, T, H, K = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    if x.stride(3) != 1:
        x = x.contiguous()
    positions = positions.contiguous()
    BP = max(triton.next_power_of_2(dims // 2), 1)
    BREST = triton.next_power_of_2(K - dims) if dims < K else 0
    with device_of(x):
        rope_kernel[(triton.cdiv(B * T, TOKENS),)](
            x, *x.stride()[:3], y, positions, _frequencies(theta, dims, x.device), B * T, T, sign, H, K,
            ONE_ROW=positions.dim() == 1, HALF=dims // 2, R=TOKENS, BP=BP, BREST=BREST,
        )  # fmt: skip
    return y


def _forward(x: Tensor, positions: Tensor, theta: float, dims: int) -> Tensor:
    return _turned(x, positions, theta, dims, 1.0)


def _backward(dy: Tensor, positions: Tensor, theta: float, dims: int) -> Tensor:
    return _turned(dy, positions, theta, dims, -1.0)


def _like(x, positions, theta, dims):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    _, positions, ctx.theta, ctx.dims = inputs
    ctx.save_for_backward(positions)


def _gradients(backward, ctx, dy):
    return backward(dy, *ctx.saved_tensors, ctx.theta, ctx.dims), None, None, None


rope = differentiable(
    "rope_triton", _forward, _backward, like=_like, gradients_like=_like, save=_save, gradients=_gradients
)
