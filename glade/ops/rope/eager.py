"""The rotation in torch's own functions, left to autograd: backend `torch`."""

import torch
from torch import Tensor


def frequencies(theta: float, dims: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[dims / 2]: radians a token, pair by pair."""
    pair = torch.arange(0, dims, 2, device=device, dtype=dtype)
    return theta ** (-pair / max(dims, 1))


def rope(x: Tensor, positions: Tensor, theta: float, dims: int) -> Tensor:
    K = x.shape[3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    # [T, 1, dims / 2] or [B, T, 1, dims / 2]
    angle = positions[..., None, None].to(dtype) * frequencies(theta, dims, x.device, dtype)
    cos, sin = angle.cos(), angle.sin()
    low, high, rest = x.split([dims // 2, dims // 2, K - dims], -1)
    turned = torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)
    return torch.cat([turned, rest], -1) if dims < K else turned
