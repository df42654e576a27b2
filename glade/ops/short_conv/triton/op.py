"""The launches of the short convolution's kernels, as a torch custom op."""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from glade.ops.linear_attention.triton.launch import device_of
from glade.ops.linear_attention.triton.sums import sum_of_programs
from glade.ops.packing import checked_borders, once
from glade.ops.parts import gradient_like
from glade.ops.short_conv.activation import L2_NORM_EPS, Activation
from glade.ops.short_conv.register import final_like, no_gradient, register
from glade.ops.short_conv.triton.kernels import (
    final_state_kernel,
    short_conv_backward_kernel,
    short_conv_forward_kernel,
    state_backward_kernel,
    step_kernel,
)

TILE = 128  # elements of a step: a row of each segment of a program
NUM_WARPS = 1  # that share them: none waits for another; with more elements a thread, there is room for fewer
WIDTH = 128  # channels of a group where no norm asks for a head
SEGMENTS = (64, 32, 16)  # rows that a program walks down
PROGRAMS = 1024  # that a GPU should have at least, or segments are shorter
AHEAD = 4  # rows that are on their way from memory while one is worked on: they hide how long it takes
LONG = 8  # segments of a document, on average, from which on all are walked as if they were whole


class _Call(NamedTuple):
    """Where the documents of a call lie, and how its channels are cut."""

    num_rows: int
    num_tokens: int  # of each document, where they are not packed
    D: int
    num_documents: int
    cu_seqlens: Tensor | None
    width: int  # channels of a group

    @property
    def block(self) -> int:
        return triton.next_power_of_2(self.width)

    @property
    def side_by_side(self) -> int:
        """Segments of a program."""
        return max(1, TILE // self.block)

    @property
    def num_groups(self) -> int:
        return triton.cdiv(self.D, self.width)

    @property
    def borders(self) -> Tensor | None:
        return None if self.cu_seqlens is None else _borders(self.cu_seqlens, self.num_rows)

    def num_programs(self, segment: int) -> int:
        """Of each group of channels. Of packed documents only the number is known here: there may be some too many."""
        if self.cu_seqlens is None:
            num_segments = self.num_documents * triton.cdiv(self.num_tokens, segment)
        else:
            num_segments = self.num_rows // segment + self.num_documents
        return triton.cdiv(num_segments, self.side_by_side)

    def walk(self) -> "_Walk":
        enough = (s for s in SEGMENTS if self.num_programs(s) * self.num_groups >= PROGRAMS)
        segment = next(enough, SEGMENTS[-1])
        num_programs, packed, tables = self.num_programs(segment), self.cu_seqlens is not None, (None, None)
        if self.cu_seqlens is not None:
            tables = _segments(self.cu_seqlens, self.num_rows, segment, num_programs * self.side_by_side)
        even = not packed and self.num_tokens % segment == 0
        # how many rows a walk has costs registers where it is not known when a kernel is compiled
        whole = even or self.num_rows >= LONG * self.num_documents * segment
        cut = {"WIDTH": self.width, "BD": self.block, "BS": self.side_by_side, "SEGMENT": segment, "AHEAD": AHEAD}
        cut |= {"WHOLE": whole, "PACKED": packed, "num_warps": NUM_WARPS}
        return _Walk(num_programs, (num_programs * self.num_groups,), (*tables, self.borders), cut)


class _Walk(NamedTuple):
    """A launch of the walks down the rows."""

    num_programs: int  # of each group of channels
    grid: tuple[int]
    tables: tuple[Tensor | None, Tensor | None, Tensor | None]  # `_segments` and `_borders`
    cut: dict[str, int | bool]  # what the kernels are compiled for


def _call_of(x: Tensor, cu_seqlens: Tensor | None, l2norm_heads: int | None, l2norm_channels: int) -> _Call:
    B, T, D = x.shape
    width = l2norm_channels // l2norm_heads if l2norm_heads and l2norm_channels else min(D, WIDTH)
    if cu_seqlens is None:
        return _Call(B * T, T, D, B, None, width)
    return _Call(T, T, D, len(cu_seqlens) - 1, cu_seqlens, width)


@once
def _borders(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[N + 1] int32."""
    return checked_borders(cu_seqlens, num_tokens).to(torch.int32)


@once
def _segments(cu_seqlens: Tensor, num_tokens: int, segment: int, num_segments: int) -> tuple[Tensor, Tensor]:
    """[num_segments] int32 each: the first row of each segment, and its document, which no segment leaves. Those that
    are too many begin where the last document ends, and later."""
    borders = _borders(cu_seqlens, num_tokens)
    counts = (borders.diff() + (segment - 1)) // segment
    ends = counts.cumsum(0, dtype=torch.int32)
    index = torch.arange(num_segments, dtype=torch.int32, device=borders.device)
    documents = torch.searchsorted(ends, index, right=True, out_int32=True).clamp(max=len(counts) - 1)
    return borders[documents] + (index - (ends - counts)[documents]) * segment, documents


def _rows_of(x: Tensor, D: int) -> Tensor:
    """[rows, D] whose channels lie next to each other: a view where that can be."""
    x = x.reshape(-1, D)
    return x if x.stride(1) == 1 else x.contiguous()


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
    call = _call_of(x, cu_seqlens, l2norm_heads, l2norm_channels)
    y, final = x.new_empty(x.shape), final_like(x, weight, state, cu_seqlens)
    rows, weight, W = _rows_of(x, call.D), weight.contiguous(), weight.shape[1]
    state = None if state is None else state.contiguous()
    with device_of(x):
        if y.numel() > 0:
            walk = call.walk()
            short_conv_forward_kernel[walk.grid](
                rows, rows.stride(0), weight, bias, state, y, *walk.tables,
                call.num_rows, call.num_tokens, call.D, l2norm_channels, L2_NORM_EPS,
                W=W, SILU=activation == "silu", BIAS=bias is not None, STATE=state is not None, **walk.cut,
            )  # fmt: skip
        if final.numel() > 0:
            final_state_kernel[(call.num_documents, triton.cdiv(call.D, WIDTH))](
                rows, rows.stride(0), state, final, call.borders, call.num_tokens, call.D,
                BD=WIDTH, W=W, STATE=state is not None, PACKED=cu_seqlens is not None,
            )  # fmt: skip
    return y, final


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
    call = _call_of(x, cu_seqlens, l2norm_heads, l2norm_channels)
    rows, dy, taps, W = _rows_of(x, call.D), _rows_of(dy, call.D), weight.contiguous(), weight.shape[1]
    dx, walk = gradient_like(x), call.walk()
    dstate = no_gradient(x) if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    heads = None if state is None else x.new_empty(call.num_documents, W - 1, call.D, dtype=torch.float32)
    state = None if state is None else state.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    # of each program the gradient of the taps [D, W], and of the bias behind it
    parts = x.new_empty(walk.num_programs, (W + (bias is not None)) * call.D, dtype=torch.float32)
    with device_of(x):
        if x.numel() > 0:
            short_conv_backward_kernel[walk.grid](
                dy, dy.stride(0), rows, rows.stride(0), taps, bias, state, dfinal, dx, dx.stride(-2),
                heads, parts, *walk.tables, call.num_rows, call.num_tokens, call.D,
                l2norm_channels, L2_NORM_EPS,
                W=W, SILU=activation == "silu", BIAS=bias is not None,
                STATE=state is not None, FINAL=dfinal is not None, **walk.cut,
            )  # fmt: skip
        if dstate.numel() > 0:
            state_backward_kernel[(call.num_documents, triton.cdiv(call.D, WIDTH))](
                heads, taps, dfinal, dstate, call.borders, call.num_tokens, call.D,
                BD=WIDTH, W=W, FINAL=dfinal is not None, PACKED=cu_seqlens is not None,
            )  # fmt: skip
    sums = sum_of_programs(parts)
    dbias = weight.new_empty(call.D) if bias is None else sums[W * call.D :].to(bias.dtype, copy=True)
    return dx, sums[: W * call.D].view(taps.shape).to(taps.dtype), dbias, dstate


short_conv = register("triton", _forward, _backward)


def step_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    l2norm_heads: int | None,
    l2norm_channels: int,
    state: Tensor,
    slots: Tensor | None,
) -> Tensor:
    """`short_conv_step_`; a state whose rows are not laid out as [D, W - 1] is copied there and back."""
    call = _call_of(x[None], None, l2norm_heads, l2norm_channels)
    y, table = x.new_empty(x.shape), state if state[0:1].is_contiguous() else state.contiguous()
    rows = _rows_of(x, call.D)
    if y.numel() > 0:
        with device_of(x):
            step_kernel[(len(x), triton.cdiv(call.D, call.width))](
                rows, rows.stride(0), weight.contiguous(), bias, table, table.stride(0), slots, y,
                call.D, l2norm_channels, L2_NORM_EPS,
                WIDTH=call.width, BD=call.block, W=weight.shape[1],
                SILU=activation == "silu", NORM=l2norm_heads is not None, BIAS=bias is not None,
                SLOTS=slots is not None,
            )  # fmt: skip
        if table is not state:
            state.copy_(table)
    return y
