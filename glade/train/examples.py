"""Examples as numbers and as rows: which a step takes, how many fit a pass, and how they are laid end to end."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from glade.data.order import permutation
from glade.ops.packing import rounded_up


def samples(num: int, batch_size: int, seed: int, step: int, part: int = 0, parts: int = 1) -> list[int]:
    """Which of `num` examples a step takes, or one of its `parts`: every example once an epoch, in an order of its own.

    A pure function of its arguments.
    """
    size = batch_size // parts
    low = step * batch_size + part * size
    return [int(_epoch(num, seed, i // num)[i % num]) for i in range(low, low + size)]


@lru_cache(maxsize=4)
def _epoch(num: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(num, seed, epoch, "examples")


def spaced(num: int, limit: int | None) -> list[int]:
    """The numbers below `num`, or `limit` of them evenly spread."""
    if limit is None or limit >= num:
        return list(range(num))
    return [i * num // limit for i in range(limit)]


def grouped(lengths: Sequence[int], num_tokens: int) -> Iterator[slice]:
    """Runs of neighbours that have at most `num_tokens` tokens together; a longer one stands alone."""
    start = size = 0
    for i, length in enumerate(lengths):
        if i > start and size + length > num_tokens:
            yield slice(start, i)
            start, size = i, 0
        size += length
    if start < len(lengths):
        yield slice(start, len(lengths))


def lay_out(documents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The documents end to end in one row [1, tokens] int64, and their borders [N + 1] int32."""
    ids = torch.tensor(list(chain.from_iterable(documents)), dtype=torch.int64)
    return ids[None], torch.tensor([0, *accumulate(map(len, documents))], dtype=torch.int32)


class Row(NamedTuple):
    """Tokens, each with the one that is to follow: in rows, or documents packed into one row."""

    ids: Tensor  # [B, T]
    targets: Tensor  # [B, T]; -1: none
    cu_seqlens: Tensor | None  # [N + 1] int32

    def padded(self) -> Self:
        """For `glade.train.passes`: a packed row with tokens that have no target, and documents that have no token."""
        if self.cu_seqlens is None:
            return self
        extra = rounded_up(self.ids.shape[1], 16) - self.ids.shape[1]
        ids, targets = pad(self.ids, (0, extra)), pad(self.targets, (0, extra), value=-1)
        return self._replace(ids=ids, targets=targets, cu_seqlens=padded_borders(self.cu_seqlens, ids.shape[1]))

    def all_borders(self) -> Sequence[Tensor]:
        return () if self.cu_seqlens is None else (self.cu_seqlens,)


def padded_borders(borders: Tensor, num_tokens: int) -> Tensor:
    """Borders that go on to `num_tokens`: the tokens up to there are a document of their own, and empty ones follow."""
    return pad(borders, (0, rounded_up(len(borders) + 1, 4) - len(borders)), value=num_tokens)
