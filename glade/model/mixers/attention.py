"""Causal softmax attention as a mixer: full, or over a sliding window; grouped keys, rotary positions, a gate.

    q, k, v = x W_q, x W_k, x W_v      (RMSNorm per head on q and k, then the rotation)
    y = (attention(q, k, v) * sigmoid(x W_g)) W_o

Its state is the past keys and values, a ring of `window` tokens with a window. Positions come from the state and the
documents' borders, so a continued or packed text is rotated as if it had been read alone.
Sources: arXiv:1706.03762, 2305.13245 (GQA), 2104.09864 (RoPE), Qwen3-Next (norms, gate, partial rotation).
"""

import torch
from torch import Tensor, nn

from glade.model.mixer import Mixer, matmul_flops, tensor_bytes
from glade.model.norm import RMSNorm
from glade.model.published import AttentionOptions
from glade.ops import AttentionState, attention, rope
from glade.ops.attention import attention_step_, empty_state, reserve
from glade.ops.packing import token_positions

# Tokens that a growing state has room for at first; it doubles from there.
MIN_CAPACITY = 64


class Attention(Mixer):
    """softmax, and with `options.window` swa."""

    state_type = AttentionState

    def __init__(self, dim: int, options: AttentionOptions) -> None:
        super().__init__()
        self.options = o = options
        self.q_proj = nn.Linear(dim, o.num_heads * o.head_dim, bias=o.qkv_bias)
        self.k_proj = nn.Linear(dim, o.num_kv_heads * o.head_dim, bias=o.qkv_bias)
        self.v_proj = nn.Linear(dim, o.num_kv_heads * o.head_dim_v, bias=o.qkv_bias)
        self.q_norm = RMSNorm(o.head_dim, o.qk_norm_eps) if o.qk_norm else None
        self.k_norm = RMSNorm(o.head_dim, o.qk_norm_eps) if o.qk_norm else None
        values = o.num_heads * o.head_dim_v
        self.output_gate_proj = nn.Linear(dim, values, bias=False) if o.attention_gate else None
        self.o_proj = nn.Linear(values, dim, bias=o.out_bias)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = True,
    ) -> tuple[Tensor, AttentionState | None]:
        q, k, v = self._heads(x)
        if self.options.rope:
            seen = None if state is None else state.length
            positions = token_positions(x.shape[1], x.device, seen, cu_seqlens)
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        o, after = attention(
            q,
            k,
            v,
            window=self.options.window,
            scale=self.options.scale,
            state=state,
            cu_seqlens=cu_seqlens,
            return_state=return_state,
        )
        return self._output(o, x), after

    def step_(self, x: Tensor, state: AttentionState, slots: Tensor | None = None) -> tuple[Tensor, AttentionState]:
        q, k, v = self._heads(x[:, None])
        if self.options.rope:
            positions = (state.length if slots is None else state.length[slots])[:, None]
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        state = self._with_room(state)
        options = self.options
        o = attention_step_(
            q[:, 0], k[:, 0], v[:, 0], state=state, window=options.window, scale=options.scale, slots=slots
        )
        return self._output(o, x), state

    def _with_room(self, state: AttentionState) -> AttentionState:
        """`state` with a free place in every row: the same tensors, or twice as much room when one is full."""
        capacity = state.k.shape[1]
        if self.options.window is not None or not len(state.length) or int(state.length.max()) < capacity:
            return state
        return reserve(state, max(2 * capacity, MIN_CAPACITY))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        o = self.options
        q = self.q_proj(x).unflatten(-1, (o.num_heads, -1))
        k = self.k_proj(x).unflatten(-1, (o.num_kv_heads, -1))
        v = self.v_proj(x).unflatten(-1, (o.num_kv_heads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        dims = round(self.options.head_dim * self.options.rope_fraction)
        return rope(x, positions, theta=self.options.rope_theta, dims=dims)

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        y = o.flatten(-2)
        if self.output_gate_proj is not None:
            y = y * torch.sigmoid(self.output_gate_proj(x))
        return self.o_proj(y)

    def init_state(self, batch: int) -> AttentionState:
        weight, o = self.o_proj.weight, self.options
        return empty_state(
            batch, o.window or 0, o.num_kv_heads, o.head_dim, o.head_dim_v, dtype=weight.dtype, device=weight.device
        )

    def flops_per_token(self, T: int) -> float:
        # a token sees itself and those before it, at most `window` in all: the average over T tokens
        window = min(self.options.window or T, T)
        seen = (window * (window + 1) / 2 + (T - window) * window) / max(T, 1)
        o = self.options
        return matmul_flops(self) + 2 * seen * o.num_heads * (o.head_dim + o.head_dim_v)

    def state_bytes(self, T: int) -> int:
        """What T tokens take; a state that grows while decoding may hold room for up to twice as many."""
        o = self.options
        kept = o.window or T
        per_token = o.num_kv_heads * (o.head_dim + o.head_dim_v) * self.o_proj.weight.element_size()
        return kept * per_token + tensor_bytes((torch.empty(1, dtype=torch.int64),))
