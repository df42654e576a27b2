"""Softmax attention in which query t sees the keys first[t] .. last[t], a block of queries at a time.

Windows, histories that differ from row to row, packed documents and any mix of them are intervals, so this is the only
loop they need. Both ends never fall as t grows; hence a block of C queries needs one run of keys, found without looking
at any other key: a window of w costs C + w - 1 keys a block, O(T w) in all, and no score outlives its block.

Each block holds all the keys of its queries, so the softmax is whole and the backward only has to make it again:
nothing but the inputs is saved. The backward adds every block's share into one buffer for all keys; left to autograd, a
slice of k or v per block would cost a zero-filled gradient of full length each, which is quadratic again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Queries to a block: of 64, 128 and 256 the fastest on one thread of a Zen 4 EPYC, T 512 and 2048, windows 128 and 512.
BLOCK = 64
# Scores of the batch rows that a GPU computes together.
MAX_SCORES = 2**24


def interval_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """o_t = sum_s softmax_s(scale q_t . k_s) v_s over first[t] <= s <= last[t].

    q [B, T, H, K], k [B, S, HKV, K], v [B, S, HKV, V]; first and last [B, T] or [1, T] int64, first <= last, neither
    falling along T. Returns o [B, T, H, V] in v's dtype; softmax and sums are fp32 (fp64 for fp64 inputs).
    """
    return _forward(q, k, v, first, last, scale)


class _Block(NamedTuple):
    """A run of queries of some rows, the run of keys they see some of, and where that some is less than all."""

    rows: slice
    queries: slice
    keys: slice
    hidden: list[tuple[slice, Tensor]]  # columns of the block's scores, and [R, C, columns] bool: not to be seen


def _blocks(q: Tensor, first: Tensor, last: Tensor) -> Iterator[_Block]:
    B, H = q.shape[0], q.shape[2]
    # What some row sees and what every row sees, fetched from a GPU at once
    some_from, some_to, all_from, all_to = torch.stack([first.amin(0), last.amax(0), first.amax(0), last.amin(0)]).cpu()
    for start, stop in _runs(some_from, some_to):
        low, high = int(some_from[start]), int(some_to[stop - 1]) + 1
        # A CPU goes row by row: it reads one row's heads in place, several rows would first be copied together
        num_rows = max(1, MAX_SCORES // (H * (stop - start) * (high - low))) if q.is_cuda else 1
        for row in range(0, B, num_rows):
            rows = slice(row, row + num_rows)
            from_, to = (x[rows if len(x) > 1 else slice(None), start:stop, None] for x in (first, last))
            hidden = _hidden(from_, to, low, high, int(all_from[stop - 1]), int(all_to[start]) + 1)
            yield _Block(rows, slice(start, stop), slice(low, high), hidden)


def _runs(some_from: Tensor, some_to: Tensor) -> Iterator[tuple[int, int]]:
    """Cuts [0, T) every BLOCK queries, and where a query shares no key with the one before it and has a history.

    Without the second kind of cut a few new tokens for each of many long histories would see all the histories.
    """
    T = len(some_from)
    apart = (some_from[1:] > some_to[:-1]) & (some_to[1:] > some_from[1:])
    cuts = [0, *(apart.nonzero()[:, 0] + 1).tolist(), T]
    for i in range(len(cuts) - 1):
        for start in range(cuts[i], cuts[i + 1], BLOCK):
            yield start, min(start + BLOCK, cuts[i + 1])


def _hidden(first: Tensor, last: Tensor, low: int, high: int, all_from: int, all_to: int) -> list[tuple[slice, Tensor]]:
    """Masks for the columns before `all_from` and from `all_to` on; between them every query sees every key."""
    column = torch.arange(low, high, device=first.device)
    if all_from >= all_to:
        return [(slice(None), (column < first) | (column > last))]
    hidden = []
    if all_from > low:
        hidden.append((slice(0, all_from - low), column[: all_from - low] < first))
    if all_to < high:
        hidden.append((slice(all_to - low, None), column[all_to - low :] > last))
    return hidden


def _heads_first(x: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """[B, C, HKV * G, D] to [B, HKV, C * G, D]: the G query heads of one key head become further queries."""
    return x.unflatten(2, (-1, num_groups)).transpose(1, 2).flatten(2, 3).to(dtype)


def _tokens_first(x: Tensor, num_groups: int) -> Tensor:
    """The inverse of `_heads_first`."""
    return x.unflatten(2, (-1, num_groups)).transpose(1, 2).flatten(2, 3)


def _probabilities(q: Tensor, k: Tensor, block: _Block, num_groups: int) -> Tensor:
    """[B, HKV, C * G, S] from q [B, HKV, C * G, K], already scaled, and k [B, HKV, S, K]."""
    scores = q @ k.transpose(2, 3)
    by_query = scores.unflatten(2, (-1, num_groups))
    for columns, mask in block.hidden:
        by_query[..., columns].masked_fill_(mask[:, None, :, None], -torch.inf)
    return torch.softmax(scores, -1)


@torch.library.custom_op("glade::interval_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    num_groups = q.shape[2] // k.shape[2]
    o = v.new_empty(*q.shape[:3], v.shape[3])
    # A custom op still sees the caller's autocast, which would put these products in its dtype
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(q, first, last):
            q_block = _heads_first(q[block.rows, block.queries], num_groups, dtype) * scale
            k_block, v_block = (x[block.rows, block.keys].transpose(1, 2).to(dtype) for x in (k, v))
            o_block = _probabilities(q_block, k_block, block, num_groups) @ v_block
            o[block.rows, block.queries] = _tokens_first(o_block, num_groups).to(v.dtype)
    return o


@_forward.register_fake
def _(q, k, v, first, last, scale):
    return v.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("glade::interval_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    num_groups = q.shape[2] // k.shape[2]
    dq = q.new_empty(q.shape)
    dk, dv = (x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3], dtype=dtype) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(q, first, last):
            q_block = _heads_first(q[block.rows, block.queries], num_groups, dtype) * scale
            do_block = _heads_first(do[block.rows, block.queries], num_groups, dtype)
            k_block, v_block = (x[block.rows, block.keys].transpose(1, 2).to(dtype) for x in (k, v))
            p = _probabilities(q_block, k_block, block, num_groups)
            dv[block.rows, :, block.keys] += p.transpose(2, 3) @ do_block
            ds = torch.ops.aten._softmax_backward_data(do_block @ v_block.transpose(2, 3), p, -1, dtype)
            dk[block.rows, :, block.keys] += ds.transpose(2, 3) @ q_block
            dq_block = (ds @ k_block) * scale
            dq[block.rows, block.queries] = _tokens_first(dq_block, num_groups).to(q.dtype)
    return dq, dk.transpose(1, 2).to(k.dtype).contiguous(), dv.transpose(1, 2).to(v.dtype).contiguous()


@_backward.register_fake
def _(do, q, k, v, first, last, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, first, last, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, first, last)


def _autograd_backward(ctx, do):
    return *_backward(do, *ctx.saved_tensors, ctx.scale), None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
