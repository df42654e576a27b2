"""The norm in torch's own functions, left to autograd: backend `torch`."""

import torch
import torch.nn.functional as F
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
    y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    if gate is not None:
        z = gate.to(wide) if gate_bias is None else gate.to(wide) + gate_bias.to(wide)
        y = y * (F.silu(z) if gate_activation == "silu" else torch.sigmoid(z))
    return y.to(dtype)
