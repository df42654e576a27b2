"""The norm as its definition, left to autograd."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_activation: str,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    v = x.to(wide)
    y = weight.to(wide) * v / torch.sqrt((v * v).mean(-1, keepdim=True) + eps)
    if gate is not None:
        z = gate.to(wide) if gate_bias is None else gate.to(wide) + gate_bias.to(wide)
        y = y * torch.sigmoid(z) * (z if gate_activation == "silu" else 1)
    return y.to(dtype)
