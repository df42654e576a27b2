"""The norms: of the residual stream, of a head's output, of q and k. Always computed in fp32 (fp64 for fp64 inputs).

Each answers in x's dtype, or in the one it is told: what a matrix product reads next needs no pass of its own then.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glade.ops import add_rms_norm, rms_norm
from glade.ops.short_conv import L2_NORM_EPS


def wide_dtype(x: Tensor) -> torch.dtype:
    """The precision of gates, norms and states: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def upcast(x: Tensor) -> Tensor:
    """`x` in `wide_dtype`: a pass over memory, unless it is in it."""
    return x.to(wide_dtype(x))


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, x [..., dim]. Source: arXiv:1910.07467."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RMSNormEpsOutside(RMSNorm):
    """weight * x / (sqrt(mean(x^2)) + eps): eps outside the root, as some published checkpoints have it."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        wide = upcast(x)
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
        return (self.weight.to(wide.dtype) * wide / (rms + self.eps)).to(dtype or x.dtype)


class LayerNorm(nn.Module):
    """weight * (x - mean) / sqrt(var + eps) + bias over the last axis; with affine=False neither weight nor bias.

    Source: arXiv:1607.06450.
    """

    def __init__(self, dim: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        wide = upcast(x)
        weight = None if self.weight is None else self.weight.to(wide.dtype)
        bias = None if self.bias is None else self.bias.to(wide.dtype)
        return F.layer_norm(wide, (self.dim,), weight, bias, self.eps).to(dtype or x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


_NORMS = {
    "rmsnorm": RMSNorm,
    "rmsnorm_eps_outside": RMSNormEpsOutside,
    "layernorm": LayerNorm,
    "layernorm_plain": lambda dim, eps: LayerNorm(dim, eps, affine=False),
    "absent": lambda dim, eps: nn.Identity(),
}


def make_norm(name: str, dim: int, eps: float) -> nn.Module:
    """The norm that `ModelConfig.norm` or `output_norm` calls `name`."""
    return _NORMS[name](dim, eps)


def norm_of_sum(norm: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """norm(x + y) in `dtype`, and x + y, in one pass over memory where that can be; a watched norm is called itself."""
    if type(norm) is RMSNorm and not norm._forward_hooks and not norm._forward_pre_hooks:
        return add_rms_norm(x, y, norm.weight, eps=norm.eps, dtype=dtype)
    total = x + y
    return norm(total, dtype=dtype), total


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis, as `glade.ops.short_conv` does it for `l2norm_heads`."""
    wide = upcast(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_NORM_EPS)).to(x.dtype)
