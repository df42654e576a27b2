"""Batches out of token stores. Which tokens stand in which batch is a pure function of (seed, step).

Training. Documents are cut into windows of `context` (input, target) pairs. A document of more pairs than that is
cut from an offset that changes with the epoch; its first and last windows may be shorter. Every pair of every document
is in exactly one window of an epoch: nothing is cropped, nothing is padded.

An epoch's whole windows are shuffled and dealt out `batch_tokens` at a time: those batches are *dense*, rows of equal
length. What is left (short documents, the ends of long ones, the whole windows that fill no batch) is shuffled, laid
end to end and cut every `batch_tokens` pairs: those are *packed* batches. A window that does not fit the end of a
packed batch goes on in the next one as a segment of its own. The two kinds are shuffled among each other, so on long
documents nearly every batch is dense, and on short ones every batch is packed.

The lengths work out without bookkeeping: with P pairs in the store, the batches of the first e epochs are
floor(e P / batch_tokens), and the (e P mod batch_tokens) pairs they leave over begin the packed batches that follow.

Held-out text is read in order, in whole windows, each from an empty state; a batch's end is filled up with positions
whose target is -1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from glade.data.order import hashes, permutation
from glade.data.store import TokenStore
from glade.errors import ConfigError, DataError


@dataclass(frozen=True)
class Batch:
    """One row of packed segments; the state begins anew at each border.

    ids        [1, T] int64
    targets    [1, T] int64    the token after each id; -1: no target, the position is padding
    cu_seqlens [N + 1] int32   borders of the segments
    dense                      every segment is `context` long: the row may be viewed as [T // context, context]
    num_targets                positions with a target
    num_bytes, num_words       of the text that the targets stand for; None where it was not measured (training)
    """

    ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    dense: bool
    num_targets: int
    num_bytes: int | None = None
    num_words: int | None = None


class _Segments:
    """Windows of a store: `starts` (token of the first input) and `lengths` (pairs), both int64 [N]."""

    def __init__(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.starts, self.lengths = starts, lengths
        self.ends = np.cumsum(lengths)

    @property
    def num_pairs(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def part(self, low: int, high: int) -> "_Segments":
        """Pairs low : high of the windows laid end to end, the first and last window cut where they must be."""
        first = int(np.searchsorted(self.ends, low, side="right"))
        last = int(np.searchsorted(self.ends, high, side="left"))
        starts, lengths = self.starts[first : last + 1].copy(), self.lengths[first : last + 1].copy()
        if len(starts):
            lengths[-1] -= int(self.ends[min(last, len(self.ends) - 1)]) - high
            skipped = low - int(self.ends[first] - self.lengths[first])
            starts[0] += skipped
            lengths[0] -= skipped
        return _Segments(starts, lengths)

    @staticmethod
    def join(parts: "Sequence[_Segments]") -> "_Segments":
        return _Segments(np.concatenate([p.starts for p in parts]), np.concatenate([p.lengths for p in parts]))


class _Epoch:
    """One pass over a store: the order of its whole windows, and of the rest."""

    def __init__(self, store: TokenStore, context: int, batch_tokens: int, seed: int, epoch: int) -> None:
        pairs = np.diff(store.starts) - 1
        # a document that fits one window is never cut
        offsets = (hashes(len(pairs), seed, epoch, "offset") % np.uint64(context)).astype(np.int64)
        offsets[pairs <= context] = 0
        num_whole, tails = np.divmod(pairs - offsets, context)
        begins = store.starts[:-1]

        order = permutation(int(num_whole.sum()), seed, epoch, "whole")
        before = np.repeat(np.cumsum(num_whole) - num_whole, num_whole)
        whole = (np.repeat(begins + offsets, num_whole) + context * (np.arange(len(order)) - before))[order]
        per_batch = batch_tokens // context
        self.num_dense = len(whole) // per_batch
        self._dense_starts = whole[: self.num_dense * per_batch].reshape(self.num_dense, per_batch)

        left = whole[self.num_dense * per_batch :]
        starts = np.concatenate([begins, begins + offsets + num_whole * context, left])
        lengths = np.concatenate([offsets, tails, np.full(len(left), context)])
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        order = permutation(len(starts), seed, epoch, "packed")
        self.packed = _Segments(starts[order], lengths[order])
        self._context = context

        num_batches = (epoch + 1) * store.num_pairs // batch_tokens - epoch * store.num_pairs // batch_tokens
        self.batch_order = permutation(num_batches, seed, epoch, "batches")

    def dense(self, index: int) -> _Segments:
        starts = self._dense_starts[index]
        return _Segments(starts, np.full(len(starts), self._context))


class _Stream:
    """The endless sequence of batches that one store gives."""

    def __init__(self, store: TokenStore, context: int, batch_tokens: int, seed: int) -> None:
        self.store, self._context, self._batch_tokens, self._seed = store, context, batch_tokens, seed
        self._epochs: dict[int, _Epoch] = {}

    def segments(self, index: int) -> _Segments:
        """The windows of batch number `index`."""
        size, pairs = self._batch_tokens, self.store.num_pairs
        epoch = -(-(index + 1) * size // pairs) - 1
        layout = self._epoch(epoch)
        number = int(layout.batch_order[index - epoch * pairs // size])
        if number < layout.num_dense:
            return layout.dense(number)
        low = (number - layout.num_dense) * size - epoch * pairs % size
        return self._packed(epoch, low, low + size)

    def _packed(self, epoch: int, low: int, high: int) -> _Segments:
        """Pairs low : high of an epoch's packed windows; a negative `low` reaches into the epochs before."""
        parts = [self._epoch(epoch).packed.part(max(low, 0), high)]
        while low < 0:
            epoch -= 1
            packed = self._epoch(epoch).packed
            parts.append(packed.part(max(packed.num_pairs + low, 0), packed.num_pairs))
            low += packed.num_pairs
        return _Segments.join(parts[::-1])

    def _epoch(self, epoch: int) -> _Epoch:
        """The layout of an epoch; the last two are kept, since a batch may reach back over a border."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = _Epoch(self.store, self._context, self._batch_tokens, self._seed, epoch)
        return self._epochs[epoch]


class Batches:
    """Training batches by number: `batch(step)` is a pure function of the stores, the arguments and `step`.

    Args:
        store: a `TokenStore`, or [(store, weight), ...]: each batch is then of one store, chosen so that after any
            number of steps every store has had its share of them to within a few batches.
        context: pairs in a window.
        batch_tokens: pairs in a batch, a multiple of `context`.
        seed: another seed is another order.
    Raises:
        ConfigError: `batch_tokens` is not a multiple of `context`, or a weight is not positive.
        DataError: a store without a document.
    """

    def __init__(
        self,
        store: TokenStore | Sequence[tuple[TokenStore, float | Fraction]],
        *,
        context: int,
        batch_tokens: int,
        seed: int,
    ) -> None:
        if context < 1 or batch_tokens < 1 or batch_tokens % context:
            raise ConfigError(
                f"a batch of {batch_tokens} tokens cannot be cut into windows of {context}; "
                f"batch_tokens must be a multiple of context"
            )
        sources = [(store, 1)] if isinstance(store, TokenStore) else list(store)
        if not sources or any(s.num_documents == 0 for s, _ in sources):
            raise DataError("there is no document to train on; the training split needs at least one")
        if any(weight <= 0 for _, weight in sources):
            raise ConfigError(f"weights are {[float(w) for _, w in sources]}; each must be positive")
        self.context, self.tokens_per_step, self._seed = context, batch_tokens, seed
        self._streams = [_Stream(s, context, batch_tokens, seed) for s, _ in sources]
        self._weights = [Fraction(weight) for _, weight in sources]

    def batch(self, step: int, *, rank: int = 0, world: int = 1) -> Batch:
        """Batch number `step`, or the share of it that one of `world` ranks takes.

        The shares are contiguous and make up the whole batch, whatever `world` is. In a packed batch a window that
        lies over the border of two shares becomes two segments.

        Raises:
            ConfigError: the batch cannot be shared out in whole windows.
        """
        if not 0 <= rank < world or step < 0:
            raise ConfigError(f"batch {step} for rank {rank} of {world}; steps and ranks count from 0")
        share, rest = divmod(self.tokens_per_step, world)
        if rest or share % self.context:
            raise ConfigError(
                f"a batch of {self.tokens_per_step} tokens cannot be shared by {world} ranks in windows of "
                f"{self.context}; batch_tokens must be a multiple of {world * self.context}"
            )
        source, index = self._source(step)
        stream = self._streams[source]
        segments = stream.segments(index)
        if world > 1:
            segments = segments.part(rank * share, (rank + 1) * share)
        return _batch(stream.store, segments, self.context)

    def epochs(self, step: int) -> tuple[float, ...]:
        """How often each store has been read through before batch `step`."""
        counts = [0] * len(self._streams)
        for source in range(len(counts)):
            counts[source] = self._count(step, source)
        return tuple(n * self.tokens_per_step / s.store.num_pairs for n, s in zip(counts, self._streams, strict=True))

    def _source(self, step: int) -> tuple[int, int]:
        """Which store batch `step` comes from, and which of that store's batches it is."""
        for source in range(len(self._streams) - 1):
            mine = self._due(step, source)
            if self._due(step + 1, source) > mine:
                return source, mine
            step -= mine
        return len(self._streams) - 1, step

    def _count(self, step: int, source: int) -> int:
        """How many of the batches before `step` come from a store."""
        for earlier in range(source):
            step -= self._due(step, earlier)
        return step if source == len(self._streams) - 1 else self._due(step, source)

    def _due(self, step: int, source: int) -> int:
        """How many of `step` batches, those of earlier stores not counted, this store takes: evenly spread."""
        share = self._weights[source] / sum(self._weights[source:])
        phase = Fraction(int(hashes(1, self._seed, source, "phase")[0]), 1 << 64)
        return math.floor(step * share + phase)


def heldout_batches(
    store: TokenStore, context: int, batch_tokens: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """The held-out documents in order, each in windows of `context` pairs from its beginning, each pair once.

    Windows stay whole: where the next does not fit, the batch is filled up with positions whose target is -1, so the
    result of an evaluation does not depend on `batch_tokens`.

    Args:
        max_tokens: score at most this many targets: windows evenly spaced over the whole split; None is all of it.
    Raises:
        ConfigError: `batch_tokens` is less than `context`, or `max_tokens` less than 1.
        DataError: a store without a document.
    """
    if not 1 <= context <= batch_tokens:
        raise ConfigError(
            f"a window of {context} tokens does not fit a batch of {batch_tokens}; batch_tokens >= context >= 1"
        )
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; at least 1 token must be scored, or None for all")
    if store.num_documents == 0:
        raise DataError("there is no held-out document; prepare with heldout > 0 or with a heldout_corpus")
    windows = _in_order(store, context)
    if max_tokens is not None and max_tokens < windows.num_pairs:
        windows = _spaced(windows, max_tokens)
    first = 0
    while first < len(windows.starts):
        done = int(windows.ends[first] - windows.lengths[first])
        end = int(np.searchsorted(windows.ends, done + batch_tokens, side="right"))
        yield _batch(
            store, _Segments(windows.starts[first:end], windows.lengths[first:end]), context, pad_to=batch_tokens
        )
        first = end


def _in_order(store: TokenStore, context: int) -> _Segments:
    pairs = np.diff(store.starts) - 1
    counts = -(-pairs // context)
    number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(store.starts[:-1], counts) + number * context
    lengths = np.minimum(context, np.repeat(pairs, counts) - number * context)
    return _Segments(starts, lengths)


def _spaced(windows: _Segments, max_tokens: int) -> _Segments:
    """As many windows as `max_tokens` allows, evenly spaced, the last one shortened where that meets it exactly."""
    num = len(windows.starts)
    taken = min(num, -(-max_tokens * num // windows.num_pairs))
    index = np.arange(taken) * num // taken
    chosen = _Segments(windows.starts[index], windows.lengths[index])
    return chosen.part(0, min(max_tokens, chosen.num_pairs))


def _batch(store: TokenStore, segments: _Segments, context: int, pad_to: int = 0) -> Batch:
    spans = list(zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True))
    num_targets = segments.num_pairs
    size = max(num_targets, pad_to)
    ids, targets = np.zeros(size, np.int64), np.full(size, -1, np.int64)
    at = 0
    for start, length in spans:
        tokens = store.tokens(start, length + 1)
        ids[at : at + length], targets[at : at + length] = tokens[:-1], tokens[1:]
        at += length
    borders = np.concatenate([[0], segments.ends, np.arange(num_targets + context, size + context, context)])
    borders = np.minimum(borders, size)
    sizes = [store.text_sizes(start + 1, length) for start, length in spans]
    measured = [s for s in sizes if s is not None]
    complete = len(measured) == len(sizes)
    return Batch(
        ids=torch.from_numpy(ids)[None],
        targets=torch.from_numpy(targets)[None],
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        dense=bool((np.diff(borders) == context).all()),
        num_targets=num_targets,
        num_bytes=sum(b for b, _ in measured) if complete else None,
        num_words=sum(w for _, w in measured) if complete else None,
    )
