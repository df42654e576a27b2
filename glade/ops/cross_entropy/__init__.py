"""Cross-entropy of a linear layer's logits, which are never whole in memory.

    loss_t = logsumexp(W x_t + b) - (W x_t + b)[target_t]

With a vocabulary of 50,000 and 8,192 tokens the logits alone are 1.6 GB in fp32, and their gradient as much again; here
they exist one chunk of tokens at a time, in the forward and again in the backward. It returns one loss a token: what to
average over, and with which weights, is the caller's business.
"""

import torch
from torch import Tensor

from glade.ops.cross_entropy import chunked, triton

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The loss of every token, from the last layer's input.

        loss_t = logsumexp(W x_t + b) - (W x_t + b)[target_t]

    The matrix products run in the dtype of autocast where that is on, else in the wider of the dtypes of x and weight;
    everything after them, and the sum over chunks that makes the gradient of weight, in fp32 (fp64 for fp64 inputs).

    Args:
        x:       [..., D]
        weight:  [vocab, D]
        targets: [...] int32 or int64; a negative one means no target: its loss is 0 and it has no gradient
        bias:    [vocab], None is zeros

    Returns:
        The losses in nats, [...], fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: a shape or dtype that does not fit, or a target that is not in the vocabulary (on a GPU that is a
            device assertion).
    """
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)} and weight {list(weight.shape)}; give [..., D] and [vocab, D]")
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets has shape {list(targets.shape)}; give {list(x.shape[:-1])}, one a token of x")
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets is {targets.dtype}; give int32 or int64")
    if not x.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; give floating-point tensors")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {list(bias.shape)}; give [{len(weight)}], one number a token of the vocabulary"
        )
    on_gpu = triton.refuses(x.device, torch.promote_types(x.dtype, weight.dtype)) is None
    return (triton if on_gpu else chunked).linear_cross_entropy(x, weight, targets, bias)
