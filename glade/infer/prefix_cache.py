"""What prompts have in common is read once: states by the tokens they have read, found by the longest prefix.

A trie over token ids. Its nodes are the places where a snapshot was taken; an edge holds the tokens between two of
them and, for layers of full attention, the keys and values of just those tokens, so that snapshots along a text share
them. What is found is compared token by token: there is no hash to trust. One cache serves one model with its weights
and dtype as they are; the tokens decide all else.

Knows nothing of requests. Every state handed in or out has one row and is not to be written into.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from glade.model.mixer import tensor_bytes
from glade.model.state import State
from glade.ops import AttentionState


class Found(NamedTuple):
    """The longest prefix with a snapshot."""

    state: State | None  # after `length` tokens; None if there is no snapshot
    length: int
    shared: int  # tokens that agree with some cached text, snapshot or not; at least `length`


class _Segment(NamedTuple):
    """The keys and values of an edge's tokens in one layer of full attention, [1, tokens, HKV, K] and [..., V]."""

    k: torch.Tensor
    v: torch.Tensor


class _Node:
    """The end of an edge."""

    def __init__(self, tokens: array, segments: tuple[_Segment, ...], parent: "_Node | None") -> None:
        self.tokens, self.segments, self.parent = tokens, segments, parent
        self.snapshot: State | None = None  # growing layers left empty
        self.children: dict[int, _Node] = {}

    @property
    def edge_bytes(self) -> int:
        return len(self.tokens) * self.tokens.itemsize + sum(tensor_bytes(segment) for segment in self.segments)


class PrefixCache:
    """Snapshots of one model's states, bounded by bytes; the one used longest ago goes first.

    Args:
        max_bytes: bound of `nbytes`; 0 keeps nothing
        growing:   `growing_layers(model)`
    """

    def __init__(self, max_bytes: int, growing: Sequence[bool]) -> None:
        self.max_bytes, self.growing = max_bytes, tuple(growing)
        self.nbytes = 0
        self.hits = self.misses = 0
        self._root = _Node(array("q"), (), None)
        self._used: OrderedDict[_Node, None] = OrderedDict()  # nodes with a snapshot, the least recently used first

    def __len__(self) -> int:
        return len(self._used)

    def find(self, tokens: Sequence[int]) -> Found:
        """The snapshot of the longest prefix of `tokens`, which may be all of them."""
        node, length, shared = self._walk(tokens)
        while node.snapshot is None and node.parent is not None:
            length -= len(node.tokens)
            node = node.parent
        if node.snapshot is None:
            self.misses += 1
            return Found(None, 0, shared)
        self.hits += 1
        self._used.move_to_end(node)
        return Found(self._restore(node, node.snapshot), length, shared)

    def add(self, tokens: Sequence[int], state: State) -> None:
        """Keep `state`, which has read exactly `tokens` and belongs to the cache from now on.

        Not kept: what alone is larger than the bound, and what is there already.
        """
        node, length, shared = self._walk(tokens)
        if length == len(tokens) and node.snapshot is not None:
            self._used.move_to_end(node)
            return
        size = state.nbytes + 8 * len(tokens)
        if size > self.max_bytes or not len(tokens):
            return
        if shared > length:
            node = self._cut(node.children[tokens[length]], shared - length)
        if shared < len(tokens):
            node = self._grow(node, tokens, shared, state)
        node.snapshot = self._constant(state)
        self.nbytes += node.snapshot.nbytes
        self._used[node] = None
        while self.nbytes > self.max_bytes:
            self._evict()

    def clear(self) -> None:
        """Forget everything; hits and misses stay."""
        while self._used:
            self._evict()

    def _walk(self, tokens: Sequence[int]) -> tuple[_Node, int, int]:
        """The last node whose whole path agrees, its depth in tokens, and how many tokens agree at all."""
        node, depth = self._root, 0
        while depth < len(tokens) and (child := node.children.get(tokens[depth])) is not None:
            agree = _common(child.tokens, tokens, depth)
            if agree < len(child.tokens):
                return node, depth, depth + agree
            node, depth = child, depth + agree
        return node, depth, depth

    def _cut(self, node: _Node, at: int) -> _Node:
        """Split the edge into `node` after `at` of its tokens; the new node there."""
        assert node.parent is not None and 0 < at < len(node.tokens)
        self.nbytes -= node.edge_bytes
        # copies, so that either half can be given back alone
        front = tuple(_Segment(s.k[:, :at].clone(), s.v[:, :at].clone()) for s in node.segments)
        back = tuple(_Segment(s.k[:, at:].clone(), s.v[:, at:].clone()) for s in node.segments)
        middle = _Node(node.tokens[:at], front, node.parent)
        node.parent.children[node.tokens[0]] = middle
        node.tokens, node.segments, node.parent = node.tokens[at:], back, middle
        middle.children[node.tokens[0]] = node
        self.nbytes += node.edge_bytes + middle.edge_bytes
        return middle

    def _grow(self, node: _Node, tokens: Sequence[int], depth: int, state: State) -> _Node:
        """A new edge out of `node` for the tokens from `depth` on."""
        segments = tuple(
            _Segment(layer.k[:, depth : len(tokens)].clone(), layer.v[:, depth : len(tokens)].clone())
            for layer, grows in zip(state.layers, self.growing, strict=True)
            if grows
        )
        child = _Node(array("q", tokens[depth:]), segments, node)
        node.children[tokens[depth]] = child
        self.nbytes += child.edge_bytes
        return child

    def _constant(self, state: State) -> State:
        """The part of a state that does not grow: growing layers lose their keys and values."""
        layers = tuple(
            AttentionState(layer.k[:, :0].clone(), layer.v[:, :0].clone(), layer.length) if grows else layer
            for layer, grows in zip(state.layers, self.growing, strict=True)
        )
        return State(layers, state.position)

    def _restore(self, node: _Node, snapshot: State) -> State:
        """The snapshot with the keys and values of its whole path."""
        if not any(self.growing):
            return snapshot
        path: list[_Node] = []
        step: _Node | None = node
        while step is not None and step.parent is not None:
            path.append(step)
            step = step.parent
        pasts = iter(zip(*(each.segments for each in reversed(path)), strict=True))
        layers = []
        for layer, grows in zip(snapshot.layers, self.growing, strict=True):
            if grows:
                segments = next(pasts)
                k, v = (torch.cat(parts, dim=1) for parts in zip(*segments, strict=True))
                layer = AttentionState(k, v, layer.length)
            layers.append(layer)
        return State(tuple(layers), snapshot.position)

    def _evict(self) -> None:
        """Give up the snapshot used longest ago, and every edge that leads to no other one."""
        node, _ = self._used.popitem(last=False)
        assert node.snapshot is not None
        self.nbytes -= node.snapshot.nbytes
        node.snapshot = None
        while node.parent is not None and node.snapshot is None and not node.children:
            self.nbytes -= node.edge_bytes
            del node.parent.children[node.tokens[0]]
            node = node.parent


def _common(edge: array, tokens: Sequence[int], start: int) -> int:
    """How many tokens of `edge` stand in `tokens` from `start` on."""
    there = array("q", tokens[start : start + len(edge)])
    if there == edge:
        return len(edge)
    return next((i for i, (a, b) in enumerate(zip(edge, there, strict=False)) if a != b), len(there))
