"""Elman's recurrent network as a mixer, a baseline to learn from: its state cannot be computed in parallel.

    h_t = act(W_hh h_{t-1} + W_hx x_t + b_h),   y_t = act(W_yh h_t + b_y)

act is tanh, or slide(a) = min(1, max(0, a)). Source: Elman, Finding Structure in Time, Cognitive Science 14 (1990).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from glade.model.mixer import Mixer, matmul_flops
from glade.model.published import RnnActivation, RnnOptions
from glade.ops import rnn


class RnnState(NamedTuple):
    hidden: Tensor  # [B, hidden units] fp32


class Rnn(Mixer):
    """x_proj holds W_hx and b_h, o_proj W_yh and b_y."""

    state_type = RnnState

    def __init__(self, dim: int, options: RnnOptions) -> None:
        super().__init__()
        self.activation: RnnActivation = options.rnn_activation
        self.x_proj = nn.Linear(dim, options.rnn_dim, bias=True)
        self.w_hh = nn.Parameter(torch.empty(options.rnn_dim, options.rnn_dim))
        self.o_proj = nn.Linear(options.rnn_dim, dim, bias=True)

    @torch.no_grad()
    def reset_recurrence(self) -> None:
        """An orthogonal W_hh keeps the gradient's length through time; slide starts in the middle of its slope."""
        nn.init.orthogonal_(self.w_hh)
        if self.activation == "slide":
            self.x_proj.bias.fill_(0.5)
            self.o_proj.bias.fill_(0.5)

    def forward(
        self, x: Tensor, state: RnnState | None = None, cu_seqlens: Tensor | None = None, *, return_state: bool = True
    ) -> tuple[Tensor, RnnState | None]:
        before = None if state is None else state.hidden
        h, after = rnn(self.x_proj(x), self.w_hh, activation=self.activation, state=before, cu_seqlens=cu_seqlens)
        return self._output(h), RnnState(after) if return_state else None

    def step_(self, x: Tensor, state: RnnState, slots: Tensor | None = None) -> tuple[Tensor, RnnState]:
        before = state.hidden if slots is None else state.hidden[slots]
        h, after = rnn(self.x_proj(x)[:, None], self.w_hh, activation=self.activation, state=before)
        if slots is None:
            state.hidden.copy_(after)
        else:
            state.hidden[slots] = after
        return self._output(h[:, 0]), state

    def _output(self, h: Tensor) -> Tensor:
        y = self.o_proj(h)
        return torch.tanh(y) if self.activation == "tanh" else y.clamp(0, 1)

    def init_state(self, batch: int) -> RnnState:
        dtype = torch.float64 if self.w_hh.dtype == torch.float64 else torch.float32
        return RnnState(self.w_hh.new_zeros(batch, len(self.w_hh), dtype=dtype))

    def flops_per_token(self, T: int) -> float:
        return matmul_flops(self) + 2 * self.w_hh.numel()
