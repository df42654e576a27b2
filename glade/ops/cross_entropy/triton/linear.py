"""The loss over chunks of tokens on a GPU; the backward makes the logits again, so that only a chunk of them exists.

A fused kernel that never writes logits would save their passes through memory but multiply them again by kernels
slower than cuBLAS's: for 8,192 tokens, 32,000 words and 1,024 channels the four products are 2.1e12 operations, the
passes over bf16 logits (one written, one read; then one written, one read, one written, two read) 3.7 GB. The device
waits for nobody: tokens without a target are computed with the others, and their gradient is zero.
"""

import torch
from torch import Tensor

from glade.ops.cross_entropy.register import check_targets, chunks_of, register
from glade.ops.cross_entropy.triton.rows import gradients_in_place, losses_of
from glade.ops.linear_attention.triton.launch import device_of

# what a chunk's logits may take; the products of 4,000 tokens and more run at full speed
MAX_LOGITS_BYTES = 256 * 2**20


def _check(targets: Tensor, vocab: int) -> None:
    """On a GPU a target outside the vocabulary is a device assertion, as an id is for torch's embedding: to read one
    back would make every step wait for the device.

    Raises:
        ValueError: such a target on the CPU.
    """
    if targets.is_cuda:
        torch._assert_async((targets < vocab).all(), f"a target is not among the {vocab} tokens of the vocabulary")
    else:
        check_targets(targets, vocab)


def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The losses, in the shape of the targets, and the logsumexp of every token's logits, kept for the backward."""
    _check(targets, len(weight))
    inputs, matrix = x.reshape(-1, x.shape[-1]).to(matmul_dtype), weight.to(matmul_dtype)
    flat_targets = targets.reshape(-1).contiguous()
    losses, normalisers = (x.new_empty(len(inputs), dtype=torch.float32) for _ in range(2))
    with device_of(x):
        for chunk in chunks_of(len(inputs), len(weight), matmul_dtype, MAX_LOGITS_BYTES):
            losses_of(inputs[chunk] @ matrix.T, bias, flat_targets[chunk], losses[chunk], normalisers[chunk])
    return losses.view(targets.shape), normalisers


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
    dx = torch.empty_like(inputs)
    dweight = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
    dbias = dweight.new_zeros(len(weight))
    with device_of(x):
        for chunk in chunks_of(len(inputs), len(weight), matmul_dtype, MAX_LOGITS_BYTES):
            logits = inputs[chunk] @ matrix.T
            gradients_in_place(logits, bias, flat_targets[chunk], flat_dlosses[chunk], normalisers[chunk])
            if bias is not None:
                dbias += logits.sum(0, dtype=torch.float32)
            torch.mm(logits, matrix, out=dx[chunk])
            _add_product(dweight, logits.T, inputs[chunk])
    dbias = dbias.to(weight.dtype if bias is None else bias.dtype)
    return dx.view(x.shape).to(x.dtype), dweight.to(weight.dtype), dbias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [n, m] fp32 += a b. cuBLAS adds to it what it has summed in fp32, without a product in bf16 between."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


linear_cross_entropy = register("triton", _forward, _backward)
