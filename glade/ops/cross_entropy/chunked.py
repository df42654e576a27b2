"""The loss over chunks of tokens, so that only a chunk of logits ever exists; the backward computes them again.

Tokens without a target are taken out before the first product, so they cost nothing in either direction.
"""

import torch
from torch import Tensor

from glade.ops.cross_entropy import softmax
from glade.ops.cross_entropy.register import check_targets, chunks_of, register

# What one chunk's logits may take. Larger blocks are handed back to the system by the C library at every step, and
# faulted in again page by page: at 64 MiB a fifth of a step of a GPT-2 vocabulary is spent in the kernel, at 16 none.
MAX_LOGITS_BYTES = 16 * 2**20


def _kept(targets: Tensor, vocab: int) -> Tensor | slice:
    """Index of the tokens that have a target.

    Raises:
        ValueError: a target outside the vocabulary.
    """
    check_targets(targets, vocab)
    kept = targets >= 0
    return slice(None) if bool(kept.all()) else kept.nonzero()[:, 0]


def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The losses, in the shape of the targets, and the logsumexp of every token's logits, kept for the backward."""
    dtype = torch.promote_types(matmul_dtype, torch.float32)
    flat_targets = targets.reshape(-1)
    kept = _kept(flat_targets, len(weight))
    inputs = x.reshape(-1, x.shape[-1])[kept].to(matmul_dtype)
    target = flat_targets[kept].to(torch.int64)
    weight = weight.to(matmul_dtype)
    loss, normaliser = inputs.new_empty(2, len(target), dtype=dtype)
    for chunk in chunks_of(len(target), len(weight), dtype, MAX_LOGITS_BYTES):
        loss[chunk], normaliser[chunk] = softmax.losses(inputs[chunk] @ weight.T, bias, target[chunk], dtype)
    losses, normalisers = torch.zeros(2, *flat_targets.shape, dtype=dtype, device=x.device)
    losses[kept], normalisers[kept] = loss, normaliser
    return losses.view(targets.shape).clone(), normalisers.clone()


def _backward(
    dlosses: Tensor,
    normalisers: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (meaningless where there was none): d logits = (softmax - onehot) d loss."""
    dtype = normalisers.dtype
    flat_targets = targets.reshape(-1)
    kept = _kept(flat_targets, len(weight))
    inputs = x.reshape(-1, x.shape[-1])[kept].to(matmul_dtype)
    target, normaliser = flat_targets[kept].to(torch.int64), normalisers[kept]
    dloss = dlosses.reshape(-1)[kept].to(dtype)
    matrix = weight.to(matmul_dtype)
    dinputs = torch.empty_like(inputs, dtype=x.dtype)
    dweight = torch.zeros_like(weight, dtype=dtype)
    dbias = dweight.new_zeros(len(weight))
    for chunk in chunks_of(len(target), len(weight), dtype, MAX_LOGITS_BYTES):
        logits = inputs[chunk] @ matrix.T
        dlogits, of_bias = softmax.gradient(logits, bias, target[chunk], normaliser[chunk], dloss[chunk])
        if of_bias is not None:
            dbias += of_bias
        dinputs[chunk] = (dlogits @ matrix).to(x.dtype)
        if matmul_dtype == dtype:
            dweight.addmm_(dlogits.T, inputs[chunk])
        else:
            dweight += dlogits.T @ inputs[chunk]
    dx = torch.zeros(len(flat_targets), x.shape[-1], dtype=x.dtype, device=x.device)
    dx[kept] = dinputs
    return dx.view(x.shape), dweight.to(weight.dtype), dbias.to(weight.dtype if bias is None else bias.dtype)


linear_cross_entropy = register("torch", _forward, _backward)
