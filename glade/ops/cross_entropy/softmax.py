"""What a chunk of logits becomes: its losses, and its gradient. Nothing here multiplies matrices.

    loss = logsumexp(l) - l[target]        dl = (exp(l - logsumexp(l)) - 1[target]) dloss         l = logits + bias

In two passes of the compiled kernel where it serves the logits (fp32 and bf16 on the CPU), else in torch's functions.
"""

import torch
from torch import Tensor

from glade.ops.native import rows


def losses(logits: Tensor, bias: Tensor | None, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The losses and the logsumexps [C] in `dtype`, from logits [C, vocab] and target [C] int64."""
    if rows.refuses(logits.device, logits.dtype) is None:
        loss, normaliser = logits.new_empty(2, len(logits), dtype=torch.float32)
        _call("cross_entropy", logits, bias, target, loss, normaliser)
        return loss, normaliser
    logits = _with_bias(logits, bias, dtype)
    of_target = logits.take_along_dim(target[:, None], 1)[:, 0]
    highest = logits.amax(1)
    normaliser = logits.sub_(highest[:, None]).exp_().sum(1).log_().add_(highest)
    return normaliser - of_target, normaliser


def gradient(
    logits: Tensor, bias: Tensor | None, target: Tensor, normaliser: Tensor, dloss: Tensor
) -> tuple[Tensor, Tensor | None]:
    """dl [C, vocab] in the dtype of the logits, and its sum over the chunk where there is a bias."""
    if rows.refuses(logits.device, logits.dtype) is None:
        dlogits = torch.empty_like(logits)
        sums = None if bias is None else logits.new_empty(1, logits.shape[1], dtype=torch.float32)
        _call("cross_entropy_backward", logits, bias, target, dloss, normaliser.contiguous(), dlogits, sums=sums)
        return dlogits, None if sums is None else sums[0]
    dlogits = _with_bias(logits, bias, normaliser.dtype).sub_(normaliser[:, None]).exp_()
    dlogits[torch.arange(len(dlogits), device=logits.device), target] -= 1
    dlogits *= dloss[:, None]
    return dlogits.to(logits.dtype), None if bias is None else dlogits.sum(0)


def _with_bias(logits: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In `dtype`; the logits are used up, since the callers overwrite the answer."""
    logits = logits.to(dtype)
    return logits if bias is None else logits.add_(bias)


def _call(
    function: str,
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    loss: Tensor,
    normaliser: Tensor,
    dlogits: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    bias = None if bias is None else bias.float().contiguous()[None]
    vectors = (target.contiguous()[None], loss.contiguous()[None], normaliser[None])
    C, vocab = logits.shape
    rows.call(function, logits, bias, *vectors, dlogits, rows=C, width=vocab, sums=sums)
