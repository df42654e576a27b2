"""Drawing the next token of each row: temperature, top-k, top-p, min-p, Gumbel noise, as `glade.infer.sampler` has it.

Three kernels over parts of the vocabulary: `tops_kernel` finds each part's likeliest token and the sum of its
exponentials, `noise_kernel` the best token with noise among those that are left, `choose_kernel` joins the parts.

Where a row has a top-k or top-p, `restrict_kernel` finds what they leave before noise is added. It puts nothing in
order: it looks for the least number that is kept by halves. Of equal ones those with the lowest ids stay.
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
def number_at(place):
    """The number at a place in the order of all floats; the next larger one is at the next place."""
    bits = place.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(number):
    bits = number.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def reaching(numbers, vocab, floor, last, BLOCK: tl.constexpr):
    """Of the numbers above `floor`, and those equal to it up to the id `last` (None: all): how many, and their sum."""
    counts, sums = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        number = tl.load(numbers + ids, mask=ids < vocab, other=-float("inf"))
        kept = number >= floor
        if last is not None:
            kept = (number > floor) | (kept & (ids <= last))
        counts += kept.to(tl.int32)
        sums += tl.where(kept, number, 0.0)
    return tl.sum(counts, 0), tl.sum(sums, 0)


@triton.jit
def fewest(numbers, vocab, low, high, target, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """(floor, last): the fewest of the numbers, the largest first and equal ones by their ids, that reach `target`.

    Halves what lies between two places in the order of floats: all numbers from `low` on reach the target (their sum,
    or COUNTED their count), those from `high` on do not. A sum of more numbers, added in the same order, is never less.
    """
    few, many = tl.zeros([], tl.int32), tl.zeros([], tl.int32) + vocab
    while (high - low > 1) & (many - few > 1):
        middle = (low + high) >> 1
        count, sum = reaching(numbers, vocab, number_at(middle), None, BLOCK)
        enough = (count if COUNTED else sum) >= target
        low, many = tl.where(enough, middle, low), tl.where(enough, count, many)
        high, few = tl.where(enough, high, middle), tl.where(enough, few, count)
    floor = number_at(low)
    before, last = tl.full([], -1, tl.int32), tl.zeros([], tl.int32) + vocab - 1
    if many - few > 1:
        # they are equal
        while last - before > 1:
            middle_id = (before + last) >> 1
            count, sum = reaching(numbers, vocab, floor, middle_id, BLOCK)
            enough = (count if COUNTED else sum) >= target
            before, last = tl.where(enough, before, middle_id), tl.where(enough, middle_id, last)
    return floor, last


@triton.jit
def restrict_kernel(
    logits, stride, vocab, tops, temperatures, top_ks, top_ps, masses, floors, lasts,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program a row: what its top-k and, of what that leaves, top-p keep: the tokens whose mass is above the floor,
    and those at it up to the id `last`.

    masses: [rows, vocab] fp32, written: exp((logit - top) / temperature), 0 of what top-k leaves out
    """
    row = tl.program_id(0)
    wait(OVERLAP)
    logits += row.to(tl.int64) * stride
    masses += row.to(tl.int64) * vocab
    top = tl.max(tl.load(tops + row * PARTS + tl.arange(0, PARTS)), 0)
    temperature, k, p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    cold = temperature == 0
    least, last = tl.full([], -float("inf"), tl.float32), tl.zeros([], tl.int32) + vocab - 1
    if (k > 0) & (k < vocab) & (cold == 0):
        least, last = fewest(logits, vocab, place_of(least), place_of(top) + 1, k, True, BLOCK)
    rate = tl.minimum(1.4426950408889634 / tl.where(cold, 1.0, temperature), 3e38)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        logit = tl.load(logits + ids, mask=ids < vocab, other=-float("inf"))
        kept = (logit > least) | ((logit == least) & (ids <= last))
        mass = tl.where(kept, tl.exp2((logit - top) * rate), 0.0)
        tl.store(masses + ids, mass, mask=ids < vocab)
        sums += mass
    floor, last = tl.zeros([], tl.float32), tl.full([], -1, tl.int32)
    if (p < 1) & (cold == 0):
        # threads read what others wrote
        tl.debug_barrier()
        enough = p * tl.sum(sums, 0)
        floor, last = fewest(masses, vocab, place_of(floor), place_of(floor + 1) + 1, enough, False, BLOCK)
    tl.store(floors + row, floor)
    tl.store(lasts + row, last)


@triton.jit
def noise_kernel(
    logits, stride, vocab, tops, temperatures, masses, floors, lasts, min_ps, seeds, slots, positions, bests, best_ids,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """masses, floors, lasts: of `restrict_kernel`; None: nothing is left out before min-p."""
    row, part = tl.program_id(0), tl.program_id(1)
    wait(OVERLAP)
    top = tl.max(tl.load(tops + row * PARTS + tl.arange(0, PARTS)), 0)
    temperature = tl.load(temperatures + row)
    temperature = tl.where(temperature == 0, 1.0, temperature)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    scores = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=-float("inf"))
    scores = tl.div_rn(scores - top, temperature)
    if masses is not None:
        mass = tl.load(masses + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=-1.0)
        floor = tl.load(floors + row)
        kept = (mass > floor) | ((mass == floor) & (ids <= tl.load(lasts + row)))
        scores = tl.where(kept, scores, -float("inf"))
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
