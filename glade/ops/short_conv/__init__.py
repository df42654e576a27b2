"""Short convolution: each channel sees its own last W inputs, within its document.

    y_t = norm(act(bias + sum_j weight[:, j] * x_{t-W+1+j}))

x [B, T, D], weight [D, W]; sums, activation and norm are fp32 (fp64 for fp64 inputs), y has x's dtype. It knows
nothing of what the channels mean; the mixers use it on queries, keys and values, and the norm there makes unit
queries and keys in the same pass over memory.

Source: arXiv:2312.00752, section 3.4 (the convolution); arXiv:2412.06464, section 3.3 (SiLU and the norm after it).
"""

import torch
from torch import Tensor

from glade.ops.backends import Backend, choose
from glade.ops.native import rows
from glade.ops.packing import check_cu_seqlens
from glade.ops.short_conv import cpu, reference, shifted, triton
from glade.ops.short_conv.activation import L2_NORM_EPS, Activation, activate

__all__ = ["BACKENDS", "L2_NORM_EPS", "short_conv", "short_conv_step_"]

MAX_TAPS = 8

BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton.short_conv, triton.refuses),
    "cpu": Backend(cpu.short_conv, rows.refuses),
    "torch": Backend(shifted.short_conv),
    "reference": Backend(reference.short_conv, automatic=False),
}


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = "silu",
    l2norm_heads: int | None = None,
    l2norm_channels: int | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over tokens, then activation, then an optional L2 norm per head.

        y_t = norm(act(bias + sum_j weight[:, j] * x_{t-W+1+j}))

    Args:
        x:            [B, T, D]
        weight:       [D, W]      W taps, 1 to 8, the last one on the present token
        bias:         [D]         None is zeros
        activation:   "silu" or None
        l2norm_heads: split D into this many heads and divide each by sqrt(sum of squares + 1e-6); None leaves it out
        l2norm_channels: only the first this many channels are split and divided, so that queries, keys and values can
                      be one call; None is D
        state:        [B, D, W-1] the inputs before the first, oldest first; None is zeros ([N, D, W-1] with
                      cu_seqlens)
        cu_seqlens:   [N+1] int   borders of packed documents, B == 1; no tap crosses a border
        backend:      "reference", "torch", "cpu" (fp32 and bf16 on the CPU), "triton" (on NVIDIA GPUs), or
                      "auto": the fastest installed

    Returns:
        y [B, T, D] in x's dtype, and the state after the last token in the dtype of `state` (of x without one).

    Raises:
        ValueError: a shape, dtype or activation that does not fit. BackendError: `backend` cannot serve x.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}; give [B, T, D]")
    _check_channels(x, weight, bias, activation)
    unit = _unit_channels(x, l2norm_heads, l2norm_channels)
    num_rows = x.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, x.shape[0])
    if state is not None:
        _check_state(state, num_rows, weight)
    run = BACKENDS[choose("short_conv", BACKENDS, backend, x.device, x.dtype)].run
    return run(x, weight, bias, activation, l2norm_heads, unit, state, cu_seqlens)


def short_conv_step_(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = "silu",
    l2norm_heads: int | None = None,
    l2norm_channels: int | None = None,
    state: Tensor,
    slots: Tensor | None = None,
) -> Tensor:
    """One token a row of `short_conv`, for decoding: `state` is updated in place and nothing is differentiated.

    Args:
        x:     [B, D]
        state: [B, D, W-1], or [num_slots, D, W-1] with `slots`
        slots: [B] int64, the rows of `state` that belong to x, no two the same; None takes them in order
        weight, bias, activation, l2norm_heads, l2norm_channels: as in `short_conv`

    Returns:
        y [B, D] in x's dtype.

    Raises:
        ValueError: a shape, dtype or activation that does not fit.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {list(x.shape)}; give one token a row, [B, D]")
    _check_channels(x, weight, bias, activation)
    unit = _unit_channels(x, l2norm_heads, l2norm_channels)
    if slots is not None and (slots.shape != x.shape[:1] or slots.dtype != torch.int64):
        raise ValueError(f"slots is {slots.dtype} of shape {list(slots.shape)}; give int64 [{len(x)}], one a row of x")
    _check_state(state, len(x) if slots is None else len(state), weight)
    if triton.refuses(x.device, x.dtype) is None:
        with torch.no_grad():
            return triton.step_(x, weight, bias, activation, l2norm_heads, unit, state, slots)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad():
        past = state if slots is None else state[slots]
        window = torch.cat([past, x[..., None].to(past.dtype)], -1)  # [B, D, W]
        # The present token enters the sum as it came; only the state's copy of it takes the state's dtype.
        a = x.to(dtype) * weight[:, -1].to(dtype)
        if past.shape[-1]:
            a += (past.to(dtype) * weight[:, :-1].to(dtype)).sum(-1)
        if bias is not None:
            a += bias.to(dtype)
        if slots is None:
            state.copy_(window[..., 1:])
        else:
            state[slots] = window[..., 1:]
        return activate(a, activation, l2norm_heads, unit).to(x.dtype)


def _check_channels(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> None:
    """Everything about x [..., D] and the taps that has nothing to do with tokens."""
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; give a floating-point tensor")
    D = x.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != D or not 1 <= weight.shape[1] <= MAX_TAPS:
        raise ValueError(f"weight has shape {list(weight.shape)}; give [{D}, W] with W from 1 to {MAX_TAPS}")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias has shape {list(bias.shape)}; give [{D}], one number a channel of x")
    if activation not in ("silu", None):
        raise ValueError(f"activation is {activation!r}; give 'silu' or None")


def _unit_channels(x: Tensor, l2norm_heads: int | None, l2norm_channels: int | None) -> int:
    """How many of x's channels are divided by the norm of their head."""
    if l2norm_heads is None:
        if l2norm_channels is not None:
            raise ValueError(f"l2norm_channels is {l2norm_channels} without l2norm_heads; give both or leave both out")
        return 0
    D = x.shape[-1]
    unit = D if l2norm_channels is None else l2norm_channels
    if not 0 <= unit <= D:
        raise ValueError(f"l2norm_channels is {unit}; give 0 to {D}, the channels of x")
    if l2norm_heads < 1 or unit % l2norm_heads:
        raise ValueError(f"l2norm_heads is {l2norm_heads}, which does not divide the {unit} channels of x to norm")
    return unit


def _check_state(state: Tensor, num_rows: int, weight: Tensor) -> None:
    expected = [num_rows, weight.shape[0], weight.shape[1] - 1]
    if list(state.shape) != expected or not state.is_floating_point():
        raise ValueError(f"state is {state.dtype} of shape {list(state.shape)}; give floating-point {expected}")
