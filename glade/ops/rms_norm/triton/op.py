"""The launches of the norm's kernels, as torch custom ops."""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
from torch import Tensor

from glade.ops.linear_attention.triton.launch import device_of
from glade.ops.linear_attention.triton.sums import sum_of_programs
from glade.ops.parts import gradient_like
from glade.ops.rms_norm.register import register, register_add
from glade.ops.rms_norm.triton.kernels import rms_norm_backward_kernel, rms_norm_kernel

# elements of a tile of rows, if a row is no longer; the backward has the next tile in registers, too
FORWARD_TILE, BACKWARD_TILE = 2048, 1024
# Tiles of a program of the backward, which sums the gradients of the weight, and programs that a GPU should have at
# least, or they take fewer tiles. So 32,768 tokens of 1,024 channels are about as many programs as run at once: with a
# gate, and no bias to sum for, the kernel has 63 registers, else 96.
MAX_TILES, MAX_TILES_GATED = 64, 32
PROGRAMS = 512
MAX_TOKEN = 4096  # elements of a token's heads, all in one tile, where a bias of the gate has a gradient


def takes_bias(x: Tensor) -> bool:
    """Whether the gate of x may have a bias: the heads of a token are to fill a tile, or part of it."""
    heads, n = x.shape[-2:] if x.dim() > 1 else (1, len(x))
    return heads.bit_count() == 1 and heads * triton.next_power_of_2(max(n, 1)) <= MAX_TOKEN


def _cut(n: int, tile: int, least_rows: int = 1) -> dict[str, int]:
    """Rows and channels of a tile, and warps for it."""
    BN = triton.next_power_of_2(max(n, 1))
    R = max(least_rows, tile // BN)
    return {"R": R, "BN": BN, "num_warps": min(16, max(4, 4 * R * BN // tile))}


def _tiles_of_a_program(tiles: int, most: int) -> int:
    """A power of two, so that few kernels are compiled."""
    of_one = most
    while of_one > 1 and triton.cdiv(tiles, of_one) < PROGRAMS:
        of_one //= 2
    return of_one


def _rows(x: Tensor | None, heads: int) -> tuple[Tensor | None, int, int]:
    """x as rows whose channels lie next to each other, and the strides of a token and of a head."""
    if x is None:
        return None, 0, 0
    x = x.reshape(-1, heads, x.shape[-1])
    x = x if x.stride(2) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1)


def _heads(x: Tensor, gate: str | None) -> int:
    """Rows of a token where there is a gate, which may be a slice of a wider projection and is read where it lies."""
    return 1 if gate is None or x.dim() < 2 else x.shape[-2]


def _run_forward(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    eps: float,
    gate: str | None,
) -> None:
    if y.numel() == 0:
        return
    heads, n, cut = _heads(x, gate), x.shape[-1], _cut(x.shape[-1], FORWARD_TILE)
    num_rows = x.numel() // n
    with device_of(x):
        rms_norm_kernel[(triton.cdiv(num_rows, cut["R"]),)](
            *_rows(x, heads), *_rows(other, heads), weight.contiguous(), _contiguous(bias), y, total, num_rows, eps,
            heads=heads, n=n, GATE=gate is not None, SILU=gate == "silu", BIAS=bias is not None,
            ADD=total is not None, **cut,
        )  # fmt: skip


def _run_backward(
    dy: Tensor,
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dx: Tensor,
    dother: Tensor | None,
    eps: float,
    gate: str | None,
) -> tuple[Tensor, Tensor]:
    """Writes the gradients of rows; returns those of the weight and of the gate's bias, empty where there is none."""
    n, heads = x.shape[-1], _heads(x, gate)
    if x.numel() == 0:
        return torch.zeros_like(weight), weight.new_empty(0) if bias is None else torch.zeros_like(bias)
    cut, num_rows = _cut(n, BACKWARD_TILE, 1 if bias is None else heads), x.numel() // n
    most = MAX_TILES_GATED if gate is not None and bias is None else MAX_TILES
    tiles = _tiles_of_a_program(triton.cdiv(num_rows, cut["R"]), most)
    parts = weight.new_empty(triton.cdiv(num_rows, tiles * cut["R"]), n, dtype=torch.float32)
    parts_of_bias = None if bias is None else parts.new_empty(len(parts) * cut["R"] // heads, heads, n)
    with device_of(x):
        rms_norm_backward_kernel[(len(parts),)](
            *_rows(dy, heads), *_rows(x, heads), *_rows(other, heads), weight.contiguous(), _contiguous(bias),
            dx, *_rows(dother, heads), parts, parts_of_bias, num_rows, eps,
            heads=heads, n=n, GATE=gate is not None, SILU=gate == "silu", BIAS=bias is not None,
            ADD=gate is None and other is not None,
            SPLIT=gate is None and dother is not None, TILES=tiles, **cut,
        )  # fmt: skip
    dbias = weight.new_empty(0)
    if bias is not None and parts_of_bias is not None:
        dbias = sum_of_programs(parts_of_bias).to(bias.dtype)
    return sum_of_programs(parts).to(weight.dtype), dbias


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _forward(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_activation: str,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    y = x.new_empty(x.shape, dtype=dtype)
    _run_forward(x, gate, weight, gate_bias, y, None, eps, None if gate is None else gate_activation)
    return y


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    if gate is None:
        dweight, dbias = _run_backward(dy, x, None, weight, None, dx, None, eps, None)
        return dx, dweight, x.new_empty(0), dbias
    dgate = gradient_like(gate)
    dweight, dbias = _run_backward(dy, x, gate, weight, gate_bias, dx, dgate, eps, gate_activation)
    return dx, dweight, dgate, dbias


def _add_forward(x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    normed, total = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape)
    _run_forward(x, y, weight, None, normed, total, eps, None)
    return normed, total


def _add_backward(
    dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, y_dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx = total.new_empty(total.shape)
    dy = None if y_dtype == total.dtype else total.new_empty(total.shape, dtype=y_dtype)
    dweight, _ = _run_backward(dnormed, total, dtotal, weight, None, dx, dy, eps, None)
    return dx, total.new_empty(0) if dy is None else dy, dweight


rms_norm = register("triton", _forward, _backward)
add_rms_norm = register_add("triton", _add_forward, _add_backward)
