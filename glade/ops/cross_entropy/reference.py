"""The loss as its definition, with all logits in memory."""

import torch
from torch import Tensor


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    logits = x.to(dtype) @ weight.T.to(dtype)
    if bias is not None:
        logits = logits + bias.to(dtype)
    kept = targets >= 0
    of_target = logits.take_along_dim(targets.clamp(min=0)[..., None], -1)[..., 0]
    return torch.where(kept, logits.logsumexp(-1) - of_target, 0)
