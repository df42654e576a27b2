"""The mixers that decay and do not erase: RetNet (a constant per head) and GLA (a gate per key channel).

    S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T

Sources: arXiv:2307.08621 (RetNet, its decay; the rotation of q and k is left out), 2312.06635 (GLA).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from glade.model.mixer import projection
from glade.model.mixers.linear import Gates, Linear
from glade.model.norm import upcast
from glade.model.published import LinearOptions


class RetNet(Linear):
    """g = log(1 - 2^(-5-h)) for head h: constant, no parameters."""

    def gates(self, x: Tensor, k: Tensor) -> Gates:
        head = torch.arange(self.options.num_v_heads, device=x.device, dtype=upcast(x).dtype)
        g = torch.log1p(-torch.exp2(-5 - head))
        return Gates(g.expand(*x.shape[:-1], -1))


class GLA(Linear):
    """g = logsigmoid(z) / n, z = x W_1 W_2 + b of low rank; alpha = sigmoid(z)^(1/n) forgets slowly.

    `gate_form="sigmoid_temperature"` is another function, kept for checkpoints trained with it: g = logsigmoid(z / n)
    with SiLU and a bias between the two factors. It pulls alpha towards 1/2, a half-life of about one token.
    """

    def __init__(self, dim: int, options: LinearOptions) -> None:
        super().__init__(dim, options)
        self.inside = options.gate_form == "sigmoid_temperature"
        self.decay_proj = projection(dim, self.key_dim, rank=options.gate_rank, bias=True, inner_bias=self.inside)

    def gates(self, x: Tensor, k: Tensor) -> Gates:
        n = self.options.gate_normalizer
        if self.inside and self.options.gate_rank:
            first, second = self.decay_proj.children()
            z = upcast(second(F.silu(first(x))))
        else:
            z = upcast(self.decay_proj(x))
        g = F.logsigmoid(z / n) if self.inside else F.logsigmoid(z) / n
        return Gates(self._over_value_heads(g.unflatten(-1, (self.options.num_heads, -1))))
