"""Drawing the next token of each row: temperature, min-p and Gumbel noise, as `glade.infer.sampler` has them.

Three kernels over parts of the vocabulary: `tops_kernel` finds each part's likeliest token and the sum of its
exponentials, `noise_kernel` the best token with noise among those that min-p leaves, `choose_kernel` joins the parts.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl
from triton.language.extra import libdevice

from glade.infer.captured.kernels.overlap import wait


@triton.jit
def mix(x):
    """`_mix_` of the sampler; 32-bit products wrap by themselves."""
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def gumbel(seed, position, ids, INTERPRETED: tl.constexpr):
    row = mix((seed >> 32).to(tl.uint32))
    row = mix(row ^ seed.to(tl.uint32))
    row = mix(row ^ (position >> 32).to(tl.uint32))
    first = mix(row ^ position.to(tl.uint32))
    second = mix(first ^ 0x5BF03635)
    bits = mix(mix(ids.to(tl.uint32) ^ first) + second)
    w = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    if INTERPRETED:
        # log1p(-w) without losing the digits of a small w
        left = 1 - w
        logarithm = tl.where(left == 1, -w, tl.log(left) * (w / (1 - left + (left == 1))))
        noise = -tl.log(-logarithm)
    else:
        noise = -libdevice.log(-libdevice.log1p(-w))
    return noise


@triton.jit
def tops_kernel(
    logits, stride, vocab, tops, top_ids, sums, BLOCK: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr
):
    row, part = tl.program_id(0), tl.program_id(1)
    wait(OVERLAP)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    scores = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=-float("inf"))
    top, place = tl.max(scores, 0, return_indices=True)
    at = row * PARTS + part
    tl.store(tops + at, top)
    tl.store(top_ids + at, part * BLOCK + place)
    tl.store(sums + at, tl.sum(tl.where(ids < vocab, tl.exp(scores - top), 0.0), 0))


@triton.jit
def noise_kernel(
    logits, stride, vocab, tops, temperatures, min_ps, seeds, slots, positions, bests, best_ids,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    wait(OVERLAP)
    top = tl.max(tl.load(tops + row * PARTS + tl.arange(0, PARTS)), 0)
    temperature = tl.load(temperatures + row)
    temperature = tl.where(temperature == 0, 1.0, temperature)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    scores = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=-float("inf"))
    scores = tl.div_rn(scores - top, temperature)
    # the best score is 0
    scores = tl.where(scores < tl.log(tl.load(min_ps + row)), -float("inf"), scores)
    position = tl.load(positions + tl.load(slots + row))
    noisy = scores + gumbel(tl.load(seeds + row), position, ids, INTERPRETED)
    best, place = tl.max(noisy, 0, return_indices=True)
    at = row * PARTS + part
    tl.store(bests + at, best)
    tl.store(best_ids + at, part * BLOCK + place)


@triton.jit
def choose_kernel(
    logits, stride, vocab, tops, top_ids, sums, bests, best_ids, temperatures, slots, unread, report,
    positions, endings, spare, PARTS: tl.constexpr, DRAWN: tl.constexpr, STOPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """report [rows, 2]: the id, and the bits of its log-probability in fp32.

    STOPS: stop ids of a slot in `endings`, which is told what has come to its end; 0: it is not there
    """
    row = tl.program_id(0)
    wait(OVERLAP)
    parts = row * PARTS + tl.arange(0, PARTS)
    part_tops = tl.load(tops + parts)
    top, place = tl.max(part_tops, 0, return_indices=True)
    # a part of -inf alone has nothing to add
    total = tl.sum(tl.where(part_tops == -float("inf"), 0.0, tl.load(sums + parts) * tl.exp(part_tops - top)), 0)
    id = tl.load(top_ids + row * PARTS + place)
    if DRAWN:
        _, place = tl.max(tl.load(bests + parts), 0, return_indices=True)
        drawn = tl.load(best_ids + row * PARTS + place)
        id = tl.where(tl.load(temperatures + row) == 0, id, drawn)
    # logits that are not finite leave no order, and the log-probability below is nan
    id = tl.minimum(id, vocab - 1)
    chosen = tl.load(logits + row.to(tl.int64) * stride + id)
    logprob = chosen - top - tl.log(total)
    slot = tl.load(slots + row)
    tl.store(unread + slot, id.to(tl.int64))
    tl.store(report + 2 * row, id.to(tl.int64))
    tl.store(report + 2 * row + 1, logprob.to(tl.int32, bitcast=True).to(tl.int64))
    if STOPS:
        at = endings + slot * (2 + STOPS)
        stopped = tl.max((tl.load(at + 2 + tl.arange(0, STOPS)) == id).to(tl.int32), 0)
        over = (stopped > 0) | (tl.load(positions + slot) >= tl.load(at + 1))
        tl.store(at, spare, mask=over)
