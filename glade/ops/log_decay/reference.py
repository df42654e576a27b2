"""The decays as their definition, left to autograd."""

import torch
from torch import Tensor


def log_decay(z: Tensor, rate: Tensor, bias: Tensor | None, form: str) -> Tensor:
    dtype = torch.promote_types(z.dtype, torch.float32)
    u = z.to(dtype) if bias is None else z.to(dtype) + bias.to(dtype)
    # log(1 + e^x) = logaddexp(x, 0)
    softplus = torch.logaddexp(u if form == "softplus" else -u, u.new_zeros(()))
    return -rate.to(dtype) * softplus
