"""What attention carries from call to call: the keys and values it may still look at, one row a sequence.

Absolute position p sits in slot p % S. With a window S is the window and the slots are a ring; without one S is at
least the number of tokens seen, and slot p is simply position p.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from glade.ops.packing import longest_document


class AttentionState(NamedTuple):
    """Keys and values by slot, and how many tokens each row has seen; slots not yet written hold zeros."""

    k: Tensor  # [B, S, HKV, K]
    v: Tensor  # [B, S, HKV, V]
    length: Tensor  # [B] int64


def empty_state(
    batch: int,
    capacity: int,
    num_kv_heads: int,
    K: int,
    V: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> AttentionState:
    """The state of `batch` rows that have seen nothing; `capacity` is the window, or else the room for tokens."""
    k, v = (torch.zeros(batch, capacity, num_kv_heads, dim, dtype=dtype, device=device) for dim in (K, V))
    return AttentionState(k, v, torch.zeros(batch, dtype=torch.int64, device=device))


def reserve(state: AttentionState, capacity: int) -> AttentionState:
    """The state with room for `capacity` tokens a row, for attention without a window: a copy, or itself if it has it.

    Decoding that does not know its end doubles: `reserve(state, 2 * state.k.shape[1])` whenever it is full.
    """
    extra = capacity - state.k.shape[1]
    if extra <= 0:
        return state
    k, v = (torch.cat([x, x.new_zeros(x.shape[0], extra, *x.shape[2:])], 1) for x in state[:2])
    return AttentionState(k, v, state.length.clone())


def check_state(state: AttentionState, num_rows: int, k: Tensor, v: Tensor, window: int | None) -> None:
    """Raises ValueError unless the state fits before k [..., HKV, K] and v [..., HKV, V] of `num_rows` sequences."""
    S = state.k.shape[1] if window is None else window
    for name, x, new in (("k", state.k, k), ("v", state.v, v)):
        expected = [num_rows, S, *new.shape[-2:]]
        if list(x.shape) != expected:
            raise ValueError(f"state.{name} has shape {list(x.shape)}; give {expected}, rows, slots, heads, channels")
    if state.length.shape != (num_rows,) or state.length.dtype != torch.int64:
        raise ValueError(
            f"state.length is {state.length.dtype} of shape {list(state.length.shape)}; give int64 [{num_rows}]"
        )


def check_no_ring(state: AttentionState) -> None:
    """Raises ValueError if the state is a ring that has gone round, which attention without a window cannot continue.

    Reads a value, which tracing cannot do. A GPU, which would have to be waited for at every layer, looks by itself and
    stops with an error of its own.
    """
    S = state.k.shape[1]
    if state.length.is_cuda:
        told = f"a state holds {S} tokens but has seen more: give its window"
        torch.ops.aten._assert_async((state.length <= S).all(), told)
    elif len(state.length) and int(state.length.max()) > S:
        raise ValueError(
            f"state has seen {int(state.length.max())} tokens but holds {S}: it is the ring of a window of {S}; "
            "give that window"
        )


def history(state: AttentionState, window: int | None) -> tuple[Tensor, Tensor]:
    """k [B, P, HKV, K] and v of the P positions before the next one, oldest first, as far as a window can reach.

    P is the same for all rows; where a row has seen fewer tokens, what stands first has no meaning.
    """
    S = state.k.shape[1]
    P = S if window is None else window - 1
    position = state.length[:, None] - P + torch.arange(P, device=state.length.device)
    slot = (position % S if S else position)[..., None, None]
    return state.k.take_along_dim(slot, 1), state.v.take_along_dim(slot, 1)


def next_state(
    state: AttentionState | None, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None
) -> AttentionState:
    """The state after the new tokens k [B, T, HKV, K] and v, as a new value, differentiable in all it is made of.

    Each slot asks which position it will hold, and takes that from the new tokens or from the old state: nothing is
    scattered, so nothing depends on the order of writes.
    """
    B, T = k.shape[:2]
    if state is None and cu_seqlens is None and window is None:
        return AttentionState(k, v, torch.full((B,), T, device=k.device))
    if cu_seqlens is None:
        added = torch.full((B,), T, device=k.device)
        start = torch.arange(B, device=k.device) * T
        most_added = T
    else:
        added, start = cu_seqlens.diff().to(torch.int64), cu_seqlens[:-1].to(torch.int64)
        # The one place where a shape depends on a value: without a window the longest document decides the room.
        most_added = longest_document(cu_seqlens, T) if window is None and len(added) else 0
    seen = torch.zeros_like(added) if state is None else state.length
    length = seen + added
    S = window or most_added + (0 if state is None else state.k.shape[1])
    last = length[:, None] - 1
    slot = torch.arange(S, device=k.device)
    position = last - (last - slot) % max(S, 1)  # [N, S] the latest position of each slot, negative: never written
    token = start[:, None] + position - seen[:, None]
    is_new = position >= seen[:, None]
    old_k, old_v = (None, None) if state is None else state[:2]
    return AttentionState(_take(k, token, is_new, old_k, position), _take(v, token, is_new, old_v, position), length)


def _take(new: Tensor, token: Tensor, is_new: Tensor, old: Tensor | None, position: Tensor) -> Tensor:
    """[N, S, heads, channels]: `token` of `new` [B, T, ...] where `is_new`, else what `old` has at `position`."""
    flat = new.flatten(0, 1)
    mask = is_new[..., None, None]
    if old is None or old.shape[1] == 0:
        kept = new.new_zeros(()) if old is None else old.new_zeros(())
    else:
        kept = old.take_along_dim((position % old.shape[1])[..., None, None], 1)
        kept = kept.masked_fill((position < 0)[..., None, None], 0)
    if len(flat) == 0:
        return kept.expand(*position.shape, *new.shape[2:]).contiguous()
    # rows taken twice are hidden in all places but one: their gradients add up zeros, in any order the same
    taken = flat.index_select(0, token.clamp(0, len(flat) - 1).flatten()).unflatten(0, token.shape)
    return torch.where(mask, taken.to(kept.dtype), kept)


def write_(state: AttentionState, k: Tensor, v: Tensor, window: int | None, slots: Tensor | None = None) -> None:
    """Puts one token a row, k [B, HKV, K] and v, into the state's own memory: into all its rows, or into `slots` [B].

    Raises:
        ValueError: no window, and a row has no place left. (On a GPU, where asking would wait for the device at every
        layer, the index itself is out of range and the kernel stops with its own error.)
    """
    S = state.k.shape[1]
    row = torch.arange(len(state.length), device=state.length.device) if slots is None else slots
    length = state.length[row]
    if window is None and not length.is_cuda and len(length) and int(length.max()) >= S:
        raise ValueError(f"state holds {S} tokens and is full; give it room with reserve(state, {max(2 * S, 1)})")
    place = length if window is None else length % window
    state.k[row, place] = k.to(state.k.dtype)
    state.v[row, place] = v.to(state.v.dtype)
    state.length[row] = length + 1
