"""Turns a backend's `forward` and `backward` into one differentiable torch custom op with fake tensors.

A backend gives two plain functions on tensors; neither sees autograd, and `torch.compile` sees neither:

    forward(x, weight, targets, bias, matmul_dtype) -> losses, normalisers (logsumexp of every token's logits)
    backward(dlosses, normalisers, x, weight, targets, bias, matmul_dtype) -> gradients of x, weight and bias (which
        means nothing where there was none)
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from glade.ops.register import differentiable

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def chunks_of(num_tokens: int, vocab: int, dtype: torch.dtype, max_logits_bytes: int) -> Iterator[slice]:
    """The tokens in as few pieces as there can be whose logits take at most so many bytes; all but the last of one
    size, and that no larger than it must be: of 32,768 tokens 8 times 4,096, of which tiles of a product leave no rest.
    """
    most = max(1, max_logits_bytes // (max(vocab, 1) * dtype.itemsize))
    size = -(-num_tokens // max(1, -(-num_tokens // most))) or 1
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def check_targets(targets: Tensor, vocab: int) -> None:
    """
    Raises:
        ValueError: a target outside the vocabulary.
    """
    largest = int(targets.max()) if targets.numel() else -1
    if largest >= vocab:
        raise ValueError(f"the largest target is {largest}, but the vocabulary has {vocab} tokens, 0 to {vocab - 1}")


def register(
    name: str, forward: Callable[..., tuple[Tensor, Tensor]], backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> Run:
    """Defines `glade::linear_cross_entropy_{name}` and its backward, and returns the call behind the contract."""

    def like(x, weight, targets, bias, matmul_dtype):
        dtype = torch.promote_types(matmul_dtype, torch.float32)
        return x.new_empty(targets.shape, dtype=dtype), x.new_empty(targets.numel(), dtype=dtype)

    def gradients_like(dlosses, normalisers, x, weight, targets, bias, matmul_dtype):
        dbias = weight.new_empty(weight.shape[0]) if bias is None else torch.empty_like(bias)
        return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias

    def save(ctx, inputs, output):
        x, weight, targets, bias, ctx.matmul_dtype = inputs
        ctx.save_for_backward(output[1], x, weight, targets, bias)

    def gradients(backward, ctx, dlosses, dnormalisers):
        normalisers, x, weight, targets, bias = ctx.saved_tensors
        dx, dweight, dbias = backward(dlosses, normalisers, x, weight, targets, bias, ctx.matmul_dtype)
        return dx, dweight, None, None if bias is None else dbias, None

    call = differentiable(
        f"linear_cross_entropy_{name}",
        forward,
        backward,
        like=like,
        gradients_like=gradients_like,
        save=save,
        gradients=gradients,
    )

    def run(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        matmul_dtype = torch.promote_types(x.dtype, weight.dtype)
        device = x.device.type
        # as everywhere in torch, autocast leaves fp64 alone
        if torch.is_autocast_enabled(device) and matmul_dtype != torch.float64:
            matmul_dtype = torch.get_autocast_dtype(device)
        return call(x, weight, targets, bias, matmul_dtype)[0]

    return run
