"""Softmax attention of one token a row over a cache of keys and values: a ring, or as far as a row has got.

Three kernels: `enter_kernel` norms and turns q and k and writes k and v into the cache, `attend_kernel` reads the
cache in `SPLITS` parts, `join_kernel` sums the parts. Lengths are read on the device.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from glade.infer.captured.kernels.heads import turned
from glade.infer.captured.kernels.overlap import wait


@triton.jit
def enter_kernel(
    z, z_stride, q, k, v, turned_q, keys, values, slots, positions, live, length, q_norm, k_norm, q_eps, k_eps,
    log_theta, H, HKV, K, V, room,
    KP: tl.constexpr, VP: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program a head of q and of k: q goes to `turned_q` [rows, H, K] fp32."""
    wait(OVERLAP)
    row, head = (tl.program_id(0) // (H + HKV)).to(tl.int64), tl.program_id(0) % (H + HKV)
    slot = tl.load(slots + row)
    position = tl.load(positions + slot)
    if head == 0:
        tl.store(length + slot, (position + 1) * tl.load(live + row))
    z += row * z_stride
    dims, columns = tl.arange(0, KP), tl.arange(0, VP)
    is_query = head < H
    # the numbers at the place where this head stands
    at = z + tl.where(is_query, q + head * K, k + (head - H) * K)
    x = tl.load(at + dims, mask=dims < K, other=0.0).to(tl.float32)
    weight = dims * 0 + 1.0
    other_weight = weight
    factor = 1.0
    if NORM:
        eps = tl.where(is_query, q_eps, k_eps)
        factor = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
        weight = norm_weight(q_norm, k_norm, is_query, dims, dims < K)
    x *= factor * weight
    if D > 0:
        HALF: tl.constexpr = D // 2
        partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
        if NORM:
            other_weight = norm_weight(q_norm, k_norm, is_query, partner, dims < D)
        x = turned(x, at, factor * other_weight, dims, position, log_theta, D, False, 0)
    if is_query:
        tl.store(turned_q + (row * H + head) * K + dims, x, mask=dims < K)
    else:
        place = ((slot * room + position % room) * HKV + head - H).to(tl.int64)
        tl.store(keys + place * K + dims, x.to(keys.dtype.element_ty), mask=dims < K)
        value = tl.load(z + v + (head - H) * V + columns, mask=columns < V, other=0.0)
        tl.store(values + place * V + columns, value.to(values.dtype.element_ty), mask=columns < V)


@triton.jit
def norm_weight(q_norm, k_norm, is_query, dims, inside):
    of_q = tl.load(q_norm + dims, mask=inside & is_query, other=0.0).to(tl.float32)
    of_k = tl.load(k_norm + dims, mask=inside & (is_query == 0), other=0.0).to(tl.float32)
    return of_q + of_k


@triton.jit
def attend_kernel(
    turned_q, keys, values, slots, positions, sums, tops, totals, scale, H, GROUP, K, V, room,
    KP: tl.constexpr, VP: tl.constexpr, BS: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program a query head and part of the cache: sums [.., V] of exp(score - top) v, tops, and totals of the exp."""
    wait(OVERLAP)
    row_head, split = tl.program_id(0), tl.program_id(1)
    row, head = (row_head // H).to(tl.int64), row_head % H
    slot = tl.load(slots + row)
    seen = tl.minimum(tl.load(positions + slot) + 1, room)
    blocks = (seen + BS - 1) // BS
    a_split = (blocks + SPLITS - 1) // SPLITS
    start = split * a_split * BS
    end = tl.minimum(start + a_split * BS, seen)
    HKV = H // GROUP
    dims, columns, places = tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, BS)
    query = scale * tl.load(turned_q + row_head.to(tl.int64) * K + dims, mask=dims < K, other=0.0)
    keys += (slot * room * HKV + head // GROUP) * K
    values += (slot * room * HKV + head // GROUP) * V
    top = -float("inf")
    total = 0.0
    sum = tl.zeros([VP], tl.float32)
    for first in range(start, end, BS):
        place = first + places
        here = place < end
        key_at = keys + place[:, None] * HKV * K + dims[None, :]
        key = tl.load(key_at, mask=here[:, None] & (dims < K)[None, :], other=0.0).to(tl.float32)
        score = tl.where(here, tl.sum(key * query[None, :], 1), -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp(score - new_top)
        shrink = tl.exp(top - new_top)
        value_at = values + place[:, None] * HKV * V + columns[None, :]
        value = tl.load(value_at, mask=here[:, None] & (columns < V)[None, :], other=0.0).to(tl.float32)
        sum = sum * shrink + tl.sum(weight[:, None] * value, 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top
    part = row_head.to(tl.int64) * SPLITS + split
    tl.store(sums + part * V + columns, sum, mask=columns < V)
    tl.store(tops + part, top)
    tl.store(totals + part, total)


@triton.jit
def join_kernel(
    sums, tops, totals, z, z_stride, gate, out, out_stride, H, V,
    VP: tl.constexpr, SPLITS: tl.constexpr, GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    row_head = tl.program_id(0).to(tl.int64)
    row, head = row_head // H, row_head % H
    parts, columns = row_head * SPLITS + tl.arange(0, SPLITS), tl.arange(0, VP)
    top = tl.load(tops + parts)
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(totals + parts), 0)
    sum_at = sums + parts[:, None] * V + columns[None, :]
    sum = tl.load(sum_at, mask=(columns < V)[None, :], other=0.0)
    y = tl.sum(weight[:, None] * sum, 0) / total
    if GATE:
        number = tl.load(z + row * z_stride + gate + head * V + columns, mask=columns < V, other=0.0)
        y *= tl.sigmoid(number.to(tl.float32))
    tl.store(out + row * out_stride + head * V + columns, y.to(out.dtype.element_ty), mask=columns < V)
