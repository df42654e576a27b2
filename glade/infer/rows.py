"""Rows of states: joined to be read on together, cut apart again, put into the places of a table.

A layer's part of a state has one row a sequence, of constant size, but in full attention, where it has room for as
many keys and values as its longest row. Here that room is kept to what is needed, and what is not written is zero.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glade.model.lm import LanguageModel
from glade.model.mixer import tensor_bytes
from glade.model.mixers.attention import MIN_CAPACITY
from glade.model.state import State
from glade.ops import AttentionState
from glade.ops.attention import reserve
from glade.ops.many import copies_of, copy_all


def growing_layers(model: LanguageModel) -> tuple[bool, ...]:
    """For each layer, whether its state grows with every token: full attention does, all else does not."""
    return tuple(isinstance(layer, AttentionState) and layer.k.shape[1] == 0 for layer in model.init_state(0).layers)


def growing_bytes(model: LanguageModel) -> int:
    """Bytes of keys and values that one more token of one sequence takes."""
    grows = growing_layers(model)
    return sum(
        tensor_bytes((layer.k[0, :0].new_empty(layer.k.shape[2:]), layer.v.new_empty(layer.v.shape[2:])))
        for layer, growing in zip(model.init_state(1).layers, grows, strict=True)
        if growing
    )


def join(states: Sequence[State], growing: Sequence[bool]) -> State:
    """The rows of all `states`, in order, as one state; growing layers get the room of the roomiest."""
    if len(states) == 1:
        return states[0]
    layers: list[Any] = []
    for parts, grows in zip(zip(*(state.layers for state in states), strict=True), growing, strict=True):
        if grows:
            room = max(part.k.shape[1] for part in parts)
            parts = [reserve(part, room) for part in parts]
        layers.append(type(parts[0])(*(torch.cat(fields) for fields in zip(*parts, strict=True))))
    return State(tuple(layers), torch.cat([state.position for state in states]))


def split(state: State, lengths: Sequence[int], growing: Sequence[bool]) -> list[State]:
    """Each row as a state of its own, no larger than its `lengths` tokens need; a single row is not copied."""
    if len(state) == 1:
        return [trim(state, lengths[0], growing)]
    return [trim(row_of(state, row), length, growing) for row, length in enumerate(lengths)]


def row_of(state: State, row: int) -> State:
    """A row as a state of its own, copied."""
    return state.with_tensors(copies_of([x[row : row + 1] for x in state.tensors()]))


def trim(state: State, length: int, growing: Sequence[bool]) -> State:
    """`state` with no more room in its growing layers than for `length` tokens a row."""
    layers = tuple(
        AttentionState(_cut(layer.k, length), _cut(layer.v, length), layer.length) if grows else layer
        for layer, grows in zip(state.layers, growing, strict=True)
    )
    return State(layers, state.position)


def _cut(x: Tensor, length: int) -> Tensor:
    # a copy, so that the room that is cut off is given back
    return x if x.shape[1] <= length else x[:, :length].clone()


def grow_(state: State, layers: Sequence[int]) -> None:
    """Room for one token more in every row of these growing layers: twice as much as before where a row is full."""
    if not layers or not len(state):
        return
    longest, grown = int(state.position.max()), list(state.layers)
    for i in layers:
        capacity = grown[i].k.shape[1]
        if longest >= capacity:
            grown[i] = reserve(grown[i], max(2 * capacity, MIN_CAPACITY))
    if any(new is not old for new, old in zip(grown, state.layers, strict=True)):
        state.layers = tuple(grown)


@torch.no_grad()
def put(table: State, slot: int, row: State, growing: Sequence[bool]) -> None:
    """Write a one-row state into a row of `table`, in the table's dtypes; a growing layer's rest becomes zero."""
    theirs, ours = [table.position[slot]], [row.position[0]]
    for to, layer, grows in zip(table.layers, row.layers, growing, strict=True):
        for name, there, here in zip(to._fields, to, layer, strict=True):
            place = there[slot]
            if grows and name != "length":
                place[here.shape[1] :] = 0
                place = place[: here.shape[1]]
            theirs.append(place)
            ours.append(here[0])
    copy_all(theirs, ours)


def rest_(table: State, slots: Tensor) -> None:
    """Rows `slots` of `table` have seen nothing: they never run full or out of positions."""
    table.position[slots] = 0
    for layer in table.layers:
        if "length" in layer._fields:
            layer.length[slots] = 0
