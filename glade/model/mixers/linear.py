"""The common body of the linear mixers: everything around the recurrence of `glade.ops.linear_attention`.

    q, k = rope(l2norm(feature_map(act(conv(x W))))),  v = act(conv(x W_v)) each with its own short convolution
    g, erase, write = gates(z, k), z = x W_z                                what a mixer is (decay.py, delta.py)
    o, state = linear_attention(q, k, v, g, erase, write)
    y = (norm(o) * act(x W_g)) W_o                                          norm per head, before the gate

All that reads x is one matrix product, q, k and v one convolution. Which of these steps a mixer has is in
`LinearOptions`. The class `Linear` is the body alone.
Sources: arXiv:2006.16236 (linear attention), 2104.09864 section 3.3 (rotated), 2412.06464 section 3.3 (this block).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glade.model.mixer import Mixer, first_map, joint, matmul_dtype, matmul_flops, projection, second_map_and_bias
from glade.model.norm import RMSNorm, l2norm, make_norm
from glade.model.published import Activation, FeatureMap, LinearOptions
from glade.ops import linear_attention, linear_attention_step_, rms_norm, rope
from glade.ops.packing import check_cu_seqlens, token_positions, tokens_seen
from glade.ops.parts import split
from glade.ops.short_conv import short_conv, short_conv_step_


class LinearState(NamedTuple):
    """What a linear mixer remembers: constant in the number of tokens."""

    recurrent: Tensor  # [B, HV, K, V] fp32
    conv_q: Tensor  # [B, H * K, W - 1], the last inputs of the convolution on q; W - 1 is 0 without one
    conv_k: Tensor  # [B, H * K, W - 1]
    conv_v: Tensor  # [B, HV * V, W - 1]
    length: Tensor  # [B] int64, tokens seen: what rotary positions count from


class Gates(NamedTuple):
    """The gates of `linear_attention`; None where the mixer has none."""

    g: Tensor | None = None  # [..., HV] or [..., HV, K], natural log
    erase: Tensor | None = None  # [..., HV] or [..., HV, K]
    write: Tensor | None = None  # [..., HV] or [..., HV, V]


class OutputGate(NamedTuple):
    """Before its activation: z [..., HV * V], and the bias [HV * V] that is still to be added, or None."""

    z: Tensor
    bias: Tensor | None

    def whole(self) -> Tensor:
        return self.z if self.bias is None else self.z + self.bias.to(self.z.dtype)


class Linear(Mixer):
    """Linear attention with a feature map, S_t = S_{t-1} + k_t v_t^T, and the base of every linear mixer."""

    state_type = LinearState

    def __init__(self, dim: int, options: LinearOptions) -> None:
        super().__init__()
        self.options = options
        self.key_dim = options.num_heads * options.head_dim
        self.value_dim = options.num_v_heads * options.head_dim_v
        self.q_proj = nn.Linear(dim, self.key_dim, bias=False)
        self.k_proj = nn.Linear(dim, self.key_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.value_dim, bias=False)
        keys = (options.num_heads, options.feature_map, options.qk_l2norm)
        self.q_conv = ShortConvolution(self.key_dim, options.conv_size, options.activation, *keys)
        self.k_conv = ShortConvolution(self.key_dim, options.conv_size, options.activation, *keys)
        self.v_conv = ShortConvolution(self.value_dim, options.conv_size, options.activation, options.num_v_heads)
        self.output_norm = make_norm(options.output_norm, options.head_dim_v, options.output_norm_eps)
        self.output_gate_proj = None
        if options.output_gate != "absent":
            self.output_gate_proj = projection(
                dim, self.value_dim, rank=options.output_gate_rank, bias=options.output_gate_bias
            )
        self.o_proj = nn.Linear(self.value_dim, dim, bias=False)

    def gate_maps(self) -> Sequence[Sequence[nn.Linear]]:
        """The maps of x that `gates` reads, in groups: the answers of a group lie side by side in one tensor."""
        return ()

    def gates(self, z: Sequence[Tensor], k: Tensor) -> Gates:
        """What is particular to a mixer. z holds one tensor [..., channels] for each group of `gate_maps`; these and
        k [..., H, K] lead with [B, T], or with [B] when decoding.
        """
        return Gates()

    def forward(
        self,
        x: Tensor,
        state: LinearState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = True,
    ) -> tuple[Tensor, LinearState | None]:
        recurrent, *past, length = state if state is not None else (None,) * 5
        qkv, z, gate = self._read(x)
        (q, k, v), past = self._convolve(qkv, past, cu_seqlens)
        g, erase, write = self.gates(z, k)
        if self.options.rope:
            positions = token_positions(x.shape[1], x.device, length, cu_seqlens)
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        o, recurrent = linear_attention(
            q, k, v, g=g, erase=erase, write=write, scale=self.options.scale, state=recurrent, cu_seqlens=cu_seqlens
        )
        y = self._output(o, gate)
        if not return_state:
            return y, None
        conv_q, conv_k, conv_v = past
        return y, LinearState(recurrent, conv_q, conv_k, conv_v, tokens_seen(x, length, cu_seqlens))

    def step_(self, x: Tensor, state: LinearState, slots: Tensor | None = None) -> tuple[Tensor, LinearState]:
        qkv, z, gate = self._read(x)
        past = (state.conv_q, state.conv_k, state.conv_v)
        parts = qkv.split([conv.channels for conv in self._convs], -1)
        q, k, v = (conv.step_(x, before, slots) for conv, x, before in zip(self._convs, parts, past, strict=True))
        g, erase, write = self.gates(z, k)
        if self.options.rope:
            positions = (state.length if slots is None else state.length[slots])[:, None]
            q, k = (self._rotate(each[:, None], positions)[:, 0] for each in (q, k))
        o = linear_attention_step_(
            q, k, v, g=g, erase=erase, write=write, scale=self.options.scale, state=state.recurrent, slots=slots
        )
        if slots is None:
            state.length.add_(1)
        else:
            state.length[slots] += 1
        return self._output(o, gate), state

    @property
    def _convs(self) -> tuple["ShortConvolution", "ShortConvolution", "ShortConvolution"]:
        return self.q_conv, self.k_conv, self.v_conv

    def _read(self, x: Tensor) -> tuple[Tensor, list[Tensor], OutputGate | None]:
        """What is made of x: q, k and v side by side; the inputs of `gates`; the input of the output gate."""
        qkv, *z = joint(x, *self._maps_of_x())
        if self.output_gate_proj is None:
            return qkv, z, None
        *z, gate = z
        return qkv, z, OutputGate(*second_map_and_bias(self.output_gate_proj, gate))

    def _maps_of_x(self) -> list[Sequence[nn.Linear]]:
        maps = [(self.q_proj, self.k_proj, self.v_proj), *self.gate_maps()]
        return maps if self.output_gate_proj is None else [*maps, (first_map(self.output_gate_proj),)]

    def joined_maps(self) -> Sequence[nn.Linear]:
        return [m for group in self._maps_of_x() for m in group]

    def _convolve(
        self, qkv: Tensor, past: Sequence[Tensor | None], cu_seqlens: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """q, k, v [B, T, heads, -1] and the new past of each: one convolution if they can be, else one by one."""
        channels = [conv.channels for conv in self._convs]
        weights: list[Tensor] = [conv.weight for conv in self._convs if conv.weight is not None]
        if not weights or self.options.feature_map != "identity":
            parts = zip(self._convs, split(qkv, channels), past, strict=True)
            pairs = [conv(part, before, cu_seqlens) for conv, part, before in parts]
            return [y for y, _ in pairs], [after for _, after in pairs]
        given = [part for part in past if part is not None]
        unit = self.options.qk_l2norm
        y, after = short_conv(
            qkv,
            torch.cat(weights),
            activation=self.v_conv.activation,
            l2norm_heads=2 * self.options.num_heads if unit else None,
            l2norm_channels=2 * self.key_dim if unit else None,
            state=torch.cat(given, 1) if given else None,
            cu_seqlens=cu_seqlens,
        )
        heads = [conv.heads for conv in self._convs]
        parts = zip(split(y, channels), heads, strict=True)
        return [part.unflatten(-1, (num, -1)) for part, num in parts], list(after.split(channels, 1))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, T, H, K] turned by its positions."""
        o = self.options
        return rope(x, positions, theta=o.rope_theta, dims=round(o.head_dim * o.rope_fraction))

    def _output(self, o: Tensor, gate: OutputGate | None) -> Tensor:
        """o [..., HV, V] -> y [..., D]."""
        activation = self.options.output_gate
        if gate is None or activation == "absent":
            return self.o_proj(self.output_norm(o).flatten(-2))
        if type(self.output_norm) is RMSNorm:
            weight, eps = self.output_norm.weight, self.output_norm.eps
            z, bias = (None if x is None else x.unflatten(-1, (self.options.num_v_heads, -1)) for x in gate)
            dtype = matmul_dtype(o)
            y = rms_norm(o, weight, eps=eps, gate=z, gate_bias=bias, gate_activation=activation, dtype=dtype)
            return self.o_proj(y.flatten(-2))
        y = self.output_norm(o).flatten(-2)
        z = gate.whole()
        return self.o_proj(y * (F.silu(z) if activation == "silu" else torch.sigmoid(z)))

    def init_state(self, batch: int) -> LinearState:
        weight = self.o_proj.weight
        recurrent_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        o = self.options
        recurrent = weight.new_zeros(batch, o.num_v_heads, o.head_dim, o.head_dim_v, dtype=recurrent_dtype)
        q, k, v = (weight.new_zeros(batch, c.channels, c.num_past) for c in (self.q_conv, self.k_conv, self.v_conv))
        return LinearState(recurrent, q, k, v, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def flops_per_token(self, T: int) -> float:
        # per value head and token: write k v^T, read S^T q, and with an erase gate read S^T k, each K * V multiply-adds
        o = self.options
        passes = 3 if self._erases else 2
        convolutions = 2 * o.conv_size * (2 * self.key_dim + self.value_dim)
        return matmul_flops(self) + convolutions + 2 * passes * o.num_v_heads * o.head_dim * o.head_dim_v

    _erases = False

    def _over_value_heads(self, x: Tensor) -> Tensor:
        """[..., H, C] -> [..., HV, C]: value head j gets key head j // (HV // H)."""
        group = self.options.num_v_heads // self.options.num_heads
        return x if group == 1 else x.repeat_interleave(group, dim=-2)


class ShortConvolution(nn.Module):
    """What stands between a projection and the heads: convolution, activation, feature map, unit norm per head.

    y [..., heads, channels / heads]. With size 0 there is no convolution and no past, only the rest.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        activation: Activation,
        heads: int,
        feature_map: FeatureMap = "identity",
        unit: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_past = max(size - 1, 0)
        self.heads = heads
        self.activation: Literal["silu"] | None = "silu" if activation == "silu" else None
        self.feature_map = feature_map
        self.weight = nn.Parameter(torch.empty(channels, size)) if size else None
        # the op takes the norm along in its pass over memory, unless a feature map must come before it
        self.fused_heads = heads if unit and size and feature_map == "identity" else None
        self.unit = unit and self.fused_heads is None

    def forward(self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, channels], past [B, channels, size - 1] -> y [B, T, heads, -1] and the new past."""
        if self.weight is None:
            rows = x.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, x.shape[0])
            y, past = self._activate(x), x.new_empty(rows, self.channels, 0)
        else:
            y, past = short_conv(
                x,
                self.weight,
                activation=self.activation,
                l2norm_heads=self.fused_heads,
                state=past,
                cu_seqlens=cu_seqlens,
            )
        return self._finish(y), past

    def step_(self, x: Tensor, past: Tensor, slots: Tensor | None) -> Tensor:
        """x [B, channels] -> y [B, heads, -1]; the rows of `past` are moved on in place."""
        if self.weight is None:
            return self._finish(self._activate(x))
        y = short_conv_step_(
            x, self.weight, activation=self.activation, l2norm_heads=self.fused_heads, state=past, slots=slots
        )
        return self._finish(y)

    def _activate(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.activation else x

    def _finish(self, y: Tensor) -> Tensor:
        y = y.unflatten(-1, (self.heads, -1))
        if self.feature_map == "elu1":
            y = F.elu(y) + 1
        elif self.feature_map == "relu":
            y = F.relu(y)
        return l2norm(y) if self.unit else y

    def extra_repr(self) -> str:
        return f"{self.channels}, size={self.num_past + 1 if self.weight is not None else 0}"
