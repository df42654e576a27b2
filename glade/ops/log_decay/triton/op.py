"""The decays' kernels on tiles of rows x channels, in fp32, and their launches as a torch custom op.

u = z + bias, x = u (softplus) or -u (logsigmoid)        g = -rate softplus(x)
dx = -dg rate sigmoid(x)        drate = -sum dg softplus(x)        dz = dx or -dx, dbias its sum
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from glade.ops.linear_attention.triton.launch import device_of
from glade.ops.linear_attention.triton.sums import sum_of_programs
from glade.ops.log_decay.register import register
from glade.ops.short_conv.triton.kernels import sigmoid

TILE = 2048  # elements of a tile
MAX_CHANNELS = 256  # of a tile
MAX_TILES = 4  # of the backward, whose sums one program makes; few, so that programs wait for memory in turns
PROGRAMS = 512  # that a GPU should have at least, or a program of the backward takes fewer tiles


@triton.jit
def argument(z, z_stride, bias, rows, columns, live, width, BIAS: tl.constexpr, SIGN: tl.constexpr):
    """[rows, columns]: what softplus is taken of."""
    u = tl.load(z + rows.to(tl.int64)[:, None] * z_stride + columns[None, :], mask=live, other=0.0).to(tl.float32)
    if BIAS:
        u += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    return u * SIGN


@triton.jit
def softplus(x, e):
    """max(x, 0) + log(1 + e) for e = exp(-|x|) to full precision, from one root and no logarithm.

    log(1 + e) = 2 atanh(s) for s = e / (2 + e) <= 1/3, of whose series in s^2 the first term left out is < 2e-9. A
    division takes many more instructions than a root.
    """
    s = e * tl.rsqrt((2 + e) * (2 + e))
    square = s * s
    series = 1 / 15 + square * (1 / 17)
    series = 1 / 13 + square * series
    series = 1 / 11 + square * series
    series = 1 / 9 + square * series
    series = 1 / 7 + square * series
    series = 1 / 5 + square * series
    series = 1 / 3 + square * series
    return tl.maximum(x, 0.0) + 2 * (s + s * square * series)


@triton.jit
def log_decay_kernel(
    z, z_stride, rate, bias, g, num_rows, width,
    BIAS: tl.constexpr, SIGN: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * BC + tl.arange(0, BC)
    live = (rows < num_rows)[:, None] & (columns < width)[None, :]
    x = argument(z, z_stride, bias, rows, columns, live, width, BIAS, SIGN)
    decay = -tl.load(rate + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    decay *= softplus(x, tl.exp(-tl.abs(x)))
    tl.store(g + rows.to(tl.int64)[:, None] * width + columns[None, :], decay, mask=live)


@triton.jit
def log_decay_backward_kernel(
    dg, dg_stride, z, z_stride, rate, bias, dz, parts_of_rate, parts_of_bias, num_rows, width,
    BIAS: tl.constexpr, SIGN: tl.constexpr, OF_RATE: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    of_rate, of_bias = tl.zeros([R, BC], tl.float32), tl.zeros([R, BC], tl.float32)
    scale = -SIGN * tl.load(rate + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    for tile in tl.range(0, TILES):
        rows = (tl.program_id(0) * TILES + tile) * R + tl.arange(0, R)
        live = (rows < num_rows)[:, None] & (columns < width)[None, :]
        x = argument(z, z_stride, bias, rows, columns, live, width, BIAS, SIGN)
        d = tl.load(dg + rows.to(tl.int64)[:, None] * dg_stride + columns[None, :], mask=live, other=0.0)
        d = d.to(tl.float32)
        if OF_RATE:
            of_rate -= d * softplus(x, tl.exp(-tl.abs(x)))
        d *= scale * sigmoid(x)
        if BIAS:
            of_bias += d
        tl.store(dz + rows.to(tl.int64)[:, None] * width + columns[None, :], d.to(dz.dtype.element_ty), mask=live)
    at = tl.program_id(0).to(tl.int64) * width + columns
    if OF_RATE:
        tl.store(parts_of_rate + at, tl.sum(of_rate, 0), mask=columns < width)
    if BIAS:
        tl.store(parts_of_bias + at, tl.sum(of_bias, 0), mask=columns < width)


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _cut(z: Tensor, bias: Tensor | None, form: str) -> dict[str, int | bool]:
    BC = min(MAX_CHANNELS, triton.next_power_of_2(z.shape[-1]))
    return {"R": TILE // BC, "BC": BC, "BIAS": bias is not None, "SIGN": 1 if form == "softplus" else -1}


def _parameters(rate: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return rate.contiguous(), None if bias is None else bias.contiguous()


def _forward(z: Tensor, rate: Tensor, bias: Tensor | None, form: str) -> Tensor:
    g = z.new_empty(z.shape, dtype=torch.float32)
    if z.numel() > 0:
        rows, cut = _rows(z), _cut(z, bias, form)
        grid = triton.cdiv(len(rows), cut["R"]), triton.cdiv(rows.shape[1], cut["BC"])
        with device_of(z):
            log_decay_kernel[grid](rows, rows.stride(0), *_parameters(rate, bias), g, *rows.shape, **cut)
    return g


def _backward(
    dg: Tensor, z: Tensor, rate: Tensor, bias: Tensor | None, form: str, of_rate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dz, of_bias = z.new_empty(z.shape), rate if bias is None else bias
    if z.numel() == 0:
        return dz, torch.zeros_like(rate), torch.zeros_like(of_bias)
    rows, dg, cut = _rows(z), _rows(dg), _cut(z, bias, form)
    width, across = rows.shape[1], triton.cdiv(rows.shape[1], cut["BC"])
    tiles = _tiles_of_a_program(triton.cdiv(len(rows), cut["R"]), across)
    blocks = triton.cdiv(len(rows), tiles * cut["R"])
    parts = rate.new_empty(2, blocks, width, dtype=torch.float32)
    with device_of(z):
        log_decay_backward_kernel[(blocks, across)](
            dg, dg.stride(0), rows, rows.stride(0), *_parameters(rate, bias), dz, *parts, *rows.shape,
            OF_RATE=of_rate, TILES=tiles, **cut,
        )  # fmt: skip
    drate = sum_of_programs(parts[0]).to(rate.dtype) if of_rate else torch.empty_like(rate)
    dbias = torch.empty_like(rate) if bias is None else sum_of_programs(parts[1]).to(bias.dtype)
    return dz, drate, dbias


def _tiles_of_a_program(down: int, across: int) -> int:
    """A power of two, so that few kernels are compiled: decays of a head are few, and one tile each is best."""
    tiles = MAX_TILES
    while tiles > 1 and triton.cdiv(down, tiles) * across < PROGRAMS:
        tiles //= 2
    return tiles


log_decay = register("triton", _forward, _backward)
