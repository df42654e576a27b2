"""The mixers that decay and do not erase: RetNet (a constant per head) and GLA (a gate per key channel).

    S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T

Sources: arXiv:2307.08621 (RetNet, its decay; the rotation of q and k is left out), 2312.06635 (GLA).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glade.model.mixer import first_map, projection, second_map, second_map_and_bias
from glade.model.mixers.linear import Gates, Linear
from glade.model.norm import upcast, wide_dtype
from glade.model.published import LinearOptions
from glade.ops import log_decay


class RetNet(Linear):
    """g = log(1 - 2^(-5-h)) for head h: constant, no parameters."""

    def gates(self, z: Sequence[Tensor], k: Tensor) -> Gates:
        head = torch.arange(self.options.num_v_heads, device=k.device, dtype=wide_dtype(k))
        g = torch.log1p(-torch.exp2(-5 - head))
        return Gates(g.expand(*k.shape[:-2], -1))


class GLA(Linear):
    """g = logsigmoid(z) / n, z = x W_1 W_2 + b of low rank; alpha = sigmoid(z)^(1/n) forgets slowly.

    `gate_form="sigmoid_temperature"` is another function, kept for checkpoints trained with it: g = logsigmoid(z / n)
    with SiLU and a bias between the two factors. It pulls alpha towards 1/2, a half-life of about one token.
    """

    def __init__(self, dim: int, options: LinearOptions) -> None:
        super().__init__(dim, options)
        self.inside = options.gate_form == "sigmoid_temperature"
        self.decay_proj = projection(dim, self.key_dim, rank=options.gate_rank, bias=True, inner_bias=self.inside)

    def gate_maps(self) -> Sequence[Sequence[nn.Linear]]:
        return ((first_map(self.decay_proj),),)

    def gates(self, z: Sequence[Tensor], k: Tensor) -> Gates:
        n = self.options.gate_normalizer
        if self.inside:
            between = F.silu(z[0]) if self.options.gate_rank else z[0]
            g = F.logsigmoid(upcast(second_map(self.decay_proj, between)) / n)
        else:
            rate = k.new_full((self.key_dim,), 1 / n, dtype=wide_dtype(k))
            z0, bias = second_map_and_bias(self.decay_proj, z[0])
            g = log_decay(z0, rate=rate, bias=bias, form="logsigmoid")
        return Gates(self._over_value_heads(g.unflatten(-1, (self.options.num_heads, -1))))
