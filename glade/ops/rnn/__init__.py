"""Elman's recurrent network: the nonlinear recurrence that the linear ones of this package stand beside.

    h_t = act(W_hh h_{t-1} + x_t),    act = tanh, or slide(a) = min(1, max(0, a))

x [B, T, D] already holds W_hx x + b_h, which is one matrix product for all tokens and so the caller's business.
Arithmetic and state are fp32 (fp64 for fp64 inputs); h has x's dtype. The recurrence cannot be cut into chunks: a step
is one matrix product, T of them in a row.

Source: Elman, Finding Structure in Time, Cognitive Science 14 (1990).
"""

from typing import Literal

import torch
from torch import Tensor

from glade.ops.packing import check_cu_seqlens
from glade.ops.rnn import stepwise

__all__ = ["bidirectional_rnn", "rnn"]

Activation = Literal["tanh", "slide"]


def rnn(
    x: Tensor,
    w_hh: Tensor,
    *,
    activation: Activation = "tanh",
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman recurrence over tokens.

        h_t = act(W_hh h_{t-1} + x_t)

    Args:
        x:          [B, T, D]   the input's part, W_hx x + b_h
        w_hh:       [D, D]      row i makes channel i of the new hidden state
        activation: "tanh", or "slide", min(1, max(0, a)), whose derivative at both corners is taken as 0
        state:      [B, D] fp32 the hidden state before the first token; None is zeros ([N, D] with cu_seqlens)
        cu_seqlens: [N+1] int   borders of packed documents, B == 1; each starts from its own state

    Returns:
        h [B, T, D] in x's dtype, and the hidden state after the last token, fp32.

    Raises:
        ValueError: a shape, dtype or activation that does not fit.
    """
    _check_inputs(x, activation, {"w_hh": w_hh})
    num_rows = x.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, x.shape[0])
    if state is not None and state.shape != (num_rows, x.shape[2]):
        raise ValueError(f"state has shape {list(state.shape)}; give [{num_rows}, {x.shape[2]}]")
    return stepwise.rnn(x, w_hh, activation, state, cu_seqlens)


def bidirectional_rnn(
    x: Tensor, w_hh_forward: Tensor, w_hh_backward: Tensor, *, activation: Activation = "tanh"
) -> Tensor:
    """Two recurrences over the same inputs, one from each end, side by side: an encoder.

        h_t = [act(W_f h_{t-1} + x_t) ; act(W_b h_{t+1} + x_t)]

    The second half of h_t depends on every token after t, so no loss that predicts the next token may be put on it, and
    there is no state to decode with: it encodes a text that is there as a whole.

    Args:
        x: [B, T, D]
        w_hh_forward, w_hh_backward: [D, D]
        activation: as in `rnn`

    Returns:
        h [B, T, 2D] in x's dtype.

    Raises:
        ValueError: a shape, dtype or activation that does not fit.
    """
    _check_inputs(x, activation, {"w_hh_forward": w_hh_forward, "w_hh_backward": w_hh_backward})
    ahead, _ = stepwise.rnn(x, w_hh_forward, activation, None, None)
    back, _ = stepwise.rnn(x.flip(1), w_hh_backward, activation, None, None)
    return torch.cat([ahead, back.flip(1)], -1)


def _check_inputs(x: Tensor, activation: Activation, weights: dict[str, Tensor]) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}; give floating-point [B, T, D]")
    D = x.shape[2]
    for name, weight in weights.items():
        if weight.shape != (D, D):
            raise ValueError(f"{name} has shape {list(weight.shape)}; give [{D}, {D}], as x has {D} channels")
    if activation not in ("tanh", "slide"):
        raise ValueError(f"activation is {activation!r}; give 'tanh' or 'slide'")
