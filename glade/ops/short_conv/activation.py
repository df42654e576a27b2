"""What follows the taps: SiLU or nothing, then an optional L2 norm per head; forward and hand-written backward."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu"] | None

# Under the root, beside the sum of squares; the only place this number is written.
L2_NORM_EPS = 1e-6


def activate(a: Tensor, activation: Activation, num_heads: int | None, num_unit: int) -> Tensor:
    """z = silu(a) or a, and its first `num_unit` channels in `num_heads` equal parts over sqrt(sum z^2 + eps)."""
    z = F.silu(a) if activation == "silu" else a
    if num_heads is None:
        return z
    parts = z[..., :num_unit].unflatten(-1, (num_heads, -1))
    unit = (parts * _inverse_norm(parts)).flatten(-2)
    return unit if num_unit == z.shape[-1] else torch.cat([unit, z[..., num_unit:]], -1)


def activate_backward(dy: Tensor, a: Tensor, activation: Activation, num_heads: int | None, num_unit: int) -> Tensor:
    """The gradient of `activate` with respect to a, from the gradient of its output."""
    dz = dy
    if num_heads is not None:
        z = F.silu(a) if activation == "silu" else a
        parts, dparts = (x[..., :num_unit].unflatten(-1, (num_heads, -1)) for x in (z, dy))
        inverse = _inverse_norm(parts)
        y = parts * inverse
        # y = z r with r = (z.z + eps)^-1/2, so dz = r dy - z r^3 (dy.z) = r (dy - y (dy.y))
        dz = (inverse * (dparts - y * (dparts * y).sum(-1, keepdim=True))).flatten(-2)
        if num_unit < z.shape[-1]:
            dz = torch.cat([dz, dy[..., num_unit:]], -1)
    return torch.ops.aten.silu_backward(dz, a) if activation == "silu" else dz


def _inverse_norm(parts: Tensor) -> Tensor:
    return torch.rsqrt(parts.square().sum(-1, keepdim=True) + L2_NORM_EPS)
