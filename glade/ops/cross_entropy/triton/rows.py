"""Rows of logits to losses, and to gradients of logits in their place: one pass over memory each.

loss = log sum exp(z + b) - (z + b)[target]            dz = (exp(z + b - normaliser) - onehot(target)) dloss
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # words of the vocabulary at a time
WORDS = 8  # of a thread: 16 bytes of bf16


@triton.jit
def losses_kernel(
    logits, bias, targets, losses, normalisers, vocab,
    BIAS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.num_programs(0) - 1 - tl.program_id(0)  # the last were written last, and are still in the cache
    logits += row.to(tl.int64) * vocab
    target = tl.load(targets + row)
    # of each few words that a thread reads at once the maximum, by which what was summed before is scaled: an exp a
    # word, and one more each few words. They meet after the loop
    highest = tl.full([BLOCK // WORDS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK // WORDS], tl.float32)
    for first in tl.range(0, vocab, BLOCK):
        words = first + tl.arange(0, BLOCK // WORDS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        z = tl.load(logits + words, mask=words < vocab, other=-float("inf")).to(tl.float32)
        if BIAS:
            z += tl.load(bias + words, mask=words < vocab, other=0.0).to(tl.float32)
        higher = tl.maximum(highest, tl.max(z, 1))
        # where all are -inf there is nothing to add
        base = tl.where(higher > -float("inf"), higher, 0.0)
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        highest = higher
    top = tl.max(highest, 0)
    normaliser = top + tl.log(tl.sum(tl.where(highest > -float("inf"), total * tl.exp(highest - top), 0.0), 0))
    of_target = tl.load(logits + target, mask=target >= 0, other=0.0).to(tl.float32)
    if BIAS:
        of_target += tl.load(bias + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(normalisers + row, normaliser)
    tl.store(losses + row, tl.where(target >= 0, normaliser - of_target, 0.0))


@triton.jit
def gradients_kernel(
    logits, bias, targets, dlosses, normalisers, vocab,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, across = tl.num_programs(0) - 1 - tl.program_id(0), tl.cdiv(vocab, BLOCK)
    row, words = program // across, program % across * BLOCK + tl.arange(0, BLOCK)
    logits += row.to(tl.int64) * vocab
    target = tl.load(targets + row)
    dloss = tl.where(target >= 0, tl.load(dlosses + row), 0.0)
    z = tl.load(logits + words, mask=words < vocab, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias + words, mask=words < vocab, other=0.0).to(tl.float32)
    dz = tl.exp(z - tl.load(normalisers + row)) - tl.where(words == target, 1.0, 0.0)
    tl.store(logits + words, (dz * dloss).to(logits.dtype.element_ty), mask=words < vocab)


def losses_of(logits: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor, normalisers: Tensor) -> None:
    """Writes losses and normalisers [n] fp32 of logits [n, vocab]; a negative target's loss is 0."""
    losses_kernel[(len(logits),)](
        logits, bias, targets, losses, normalisers, logits.shape[1],
        BIAS=bias is not None, BLOCK=BLOCK, WORDS=WORDS, num_warps=8,
    )  # fmt: skip


def gradients_in_place(
    logits: Tensor, bias: Tensor | None, targets: Tensor, dlosses: Tensor, normalisers: Tensor
) -> None:
    """Logits [n, vocab] become their gradient, in their dtype."""
    gradients_kernel[(len(logits) * triton.cdiv(logits.shape[1], BLOCK),)](
        logits, bias, targets, dlosses, normalisers, logits.shape[1], BIAS=bias is not None, BLOCK=BLOCK, num_warps=8
    )
