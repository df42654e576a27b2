"""The loss over chunks of tokens on a GPU; the backward makes the logits again, so that only a chunk of them exists.

A fused kernel that never writes logits would save their passes through memory but multiply them again by kernels
slower than cuBLAS's: for 8,192 tokens, 32,000 words and 1,024 channels the four products are 2.1e12 operations, the
passes over bf16 logits (one written, one read; then one written, one read, one written, two read) 3.7 GB. The device
waits for nobody: tokens without a target are computed with the others, and their gradient is zero.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from glade.ops.cross_entropy.triton.rows import gradients_in_place, losses_of
from glade.ops.linear_attention.triton.launch import device_of

# what a chunk's logits may take; the products of 4,000 tokens and more run at full speed
MAX_LOGITS_BYTES = 256 * 2**20


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    matmul_dtype = torch.promote_types(x.dtype, weight.dtype)
    if torch.is_autocast_enabled(x.device.type):
        matmul_dtype = torch.get_autocast_dtype(x.device.type)
    return _forward(x, weight, targets, bias, matmul_dtype)[0]


def _check(targets: Tensor, vocab: int) -> None:
    """A look at the values waits for the device, which a CUDA graph cannot record: none while one is captured.

    Raises:
        ValueError: a target outside the vocabulary.
    """
    if targets.numel() == 0 or (targets.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    largest = int(targets.max())
    if largest >= vocab:
        raise ValueError(f"the largest target is {largest}, but the vocabulary has {vocab} tokens, 0 to {vocab - 1}")


def _chunks(num_tokens: int, vocab: int, dtype: torch.dtype) -> Iterator[slice]:
    size = max(1, MAX_LOGITS_BYTES // (max(vocab, 1) * dtype.itemsize))
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


@torch.library.custom_op("glade::linear_cross_entropy_triton", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The losses, in the shape of the targets, and the logsumexp of every token's logits, kept for the backward."""
    _check(targets, len(weight))
    inputs, matrix = x.reshape(-1, x.shape[-1]).to(matmul_dtype), weight.to(matmul_dtype)
    flat_targets = targets.reshape(-1).contiguous()
    losses, normalisers = (x.new_empty(len(inputs), dtype=torch.float32) for _ in range(2))
    with device_of(x):
        for chunk in _chunks(len(inputs), len(weight), matmul_dtype):
            losses_of(inputs[chunk] @ matrix.T, bias, flat_targets[chunk], losses[chunk], normalisers[chunk])
    return losses.view(targets.shape), normalisers


@_forward.register_fake
def _(x, weight, targets, bias, matmul_dtype):
    return x.new_empty(targets.shape, dtype=torch.float32), x.new_empty(targets.numel(), dtype=torch.float32)


@torch.library.custom_op("glade::linear_cross_entropy_triton_backward", mutates_args=())
def _backward(
    dlosses: Tensor,
    normalisers: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (meaningless where there was none)."""
    inputs, matrix = x.reshape(-1, x.shape[-1]).to(matmul_dtype), weight.to(matmul_dtype)
    flat_targets, flat_dlosses = targets.reshape(-1).contiguous(), dlosses.reshape(-1).contiguous()
    dx = torch.empty_like(inputs, dtype=x.dtype)
    dweight = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
    dbias = dweight.new_zeros(len(weight))
    with device_of(x):
        for chunk in _chunks(len(inputs), len(weight), matmul_dtype):
            logits = inputs[chunk] @ matrix.T
            gradients_in_place(logits, bias, flat_targets[chunk], flat_dlosses[chunk], normalisers[chunk])
            if bias is not None:
                dbias += logits.sum(0, dtype=torch.float32)
            dx[chunk] = logits @ matrix
            if matmul_dtype == torch.float32:
                dweight.addmm_(logits.T, inputs[chunk])
            else:
                dweight += logits.T @ inputs[chunk]
    dbias = dbias.to(weight.dtype if bias is None else bias.dtype)
    return dx.view(x.shape), dweight.to(weight.dtype), dbias


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
