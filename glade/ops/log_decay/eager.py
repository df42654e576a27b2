"""The decays in torch's own functions, left to autograd: backend `torch`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def log_decay(z: Tensor, rate: Tensor, bias: Tensor | None, form: str) -> Tensor:
    dtype = torch.promote_types(z.dtype, torch.float32)
    u = z.to(dtype) if bias is None else z.to(dtype) + bias.to(dtype)
    return -rate.to(dtype) * F.softplus(u) if form == "softplus" else rate.to(dtype) * F.logsigmoid(u)
