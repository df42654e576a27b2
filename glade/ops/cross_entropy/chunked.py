"""The loss over chunks of tokens, so that only a chunk of logits ever exists; the backward computes them again.

Tokens without a target are taken out before the first product, so they cost nothing in either direction.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from glade.ops.cross_entropy import softmax

# What one chunk's logits may take. Larger blocks are handed back to the system by the C library at every step, and
# faulted in again page by page: at 64 MiB a fifth of a step of a GPT-2 vocabulary is spent in the kernel, at 16 none.
MAX_LOGITS_BYTES = 16 * 2**20


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    matmul_dtype = torch.promote_types(x.dtype, weight.dtype)
    device = x.device.type
    # As everywhere in torch, autocast leaves fp64 alone
    if torch.is_autocast_enabled(device) and matmul_dtype != torch.float64:
        matmul_dtype = torch.get_autocast_dtype(device)
    losses, _ = _forward(x, weight, targets, bias, matmul_dtype)
    return losses


def _kept(targets: Tensor, vocab: int) -> Tensor | slice:
    """Index of the tokens that have a target.

    Raises:
        ValueError: a target outside the vocabulary.
    """
    if targets.numel():
        largest = int(targets.max())
        if largest >= vocab:
            raise ValueError(
                f"the largest target is {largest}, but the vocabulary has {vocab} tokens, 0 to {vocab - 1}"
            )
    kept = targets >= 0
    return slice(None) if bool(kept.all()) else kept.nonzero()[:, 0]


def _chunks(num_tokens: int, vocab: int, dtype: torch.dtype) -> Iterator[slice]:
    size = max(1, MAX_LOGITS_BYTES // (max(vocab, 1) * dtype.itemsize))
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


@torch.library.custom_op("glade::linear_cross_entropy", mutates_args=())
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
    for chunk in _chunks(len(target), len(weight), dtype):
        loss[chunk], normaliser[chunk] = softmax.losses(inputs[chunk] @ weight.T, bias, target[chunk], dtype)
    losses, normalisers = torch.zeros(2, *flat_targets.shape, dtype=dtype, device=x.device)
    losses[kept], normalisers[kept] = loss, normaliser
    return losses.view(targets.shape).clone(), normalisers.clone()


@_forward.register_fake
def _(x, weight, targets, bias, matmul_dtype):
    dtype = torch.promote_types(matmul_dtype, torch.float32)
    losses = x.new_empty(targets.shape, dtype=dtype)
    return losses, x.new_empty(targets.numel(), dtype=dtype)


@torch.library.custom_op("glade::linear_cross_entropy_backward", mutates_args=())
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
    for chunk in _chunks(len(target), len(weight), dtype):
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


@_backward.register_fake
def _(dlosses, normalisers, x, weight, targets, bias, matmul_dtype):
    dbias = weight.new_empty(weight.shape[0]) if bias is None else torch.empty_like(bias)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _setup_context(ctx, inputs, output):
    x, weight, targets, bias, ctx.matmul_dtype = inputs
    ctx.save_for_backward(output[1], x, weight, targets, bias)


def _autograd_backward(ctx, dlosses, dnormalisers):
    normalisers, x, weight, targets, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward(dlosses, normalisers, x, weight, targets, bias, ctx.matmul_dtype)
    return dx, dweight, None, None if bias is None else dbias, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
