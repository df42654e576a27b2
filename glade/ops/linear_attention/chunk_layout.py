"""Tokens to chunks and back: the one place where batch rows and packed documents become the same thing.

Sequences (batch rows, or documents) are cut into chunks of C tokens. Chunk i of every sequence that has one stands
in one block of rows, the longest sequences first, so that the state pass is a loop over i whose step works on a
prefix of the sequences:

    rows of the chunk-major tensor [M, heads, C, dim]:  | chunk 0 of all | chunk 1 of those with >= 2 chunks | ...

The last chunk of a sequence is filled up with zeros, which is neutral: k = 0 writes nothing, g = 0 decays nothing.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from glade.ops.packing import document_borders


class ChunkLayout(NamedTuple):
    batch: int
    num_tokens: int
    chunk: int
    active: list[int]  # active[i]: how many sequences have a chunk i; never rises
    index: Tensor | None  # [M * C] token of each chunk row, T where there is none; None when rows are batch rows
    order: Tensor | None  # [N] the sequence at each rank, longest first; None when they stand in order

    @property
    def num_chunks(self) -> int:
        return sum(self.active)

    def steps(self) -> list[slice]:
        """The rows of each step i, first to last."""
        starts = [0]
        for n in self.active:
            starts.append(starts[-1] + n)
        return [slice(a, b) for a, b in pairwise(starts)]

    def to_chunks(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, heads, dim] -> [M, heads, C, dim] in `dtype`, zeros where there is no token."""
        heads, dim = x.shape[2:]
        chunks = x.new_empty(self.num_chunks, heads, self.chunk, dim, dtype=dtype)
        if self.index is None:
            n, missing = len(self.active), -self.num_tokens % self.chunk
            if missing:
                x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
            x = x.unflatten(1, (n, self.chunk)).permute(1, 0, 3, 2, 4)
            chunks.view(n, self.batch, heads, self.chunk, dim).copy_(x)
        else:
            rows = x[0].index_select(0, self.index.clamp(max=self.num_tokens - 1))
            rows = rows.masked_fill_((self.index == self.num_tokens)[:, None, None], 0)
            chunks.copy_(rows.view(-1, self.chunk, heads, dim).transpose(1, 2))
        return chunks

    def to_tokens(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[M, heads, C, dim] -> [B, T, heads, dim] in `dtype`."""
        heads, dim = x.shape[1], x.shape[3]
        tokens = x.new_empty(self.batch, self.num_tokens, heads, dim, dtype=dtype)
        if self.index is None:
            x = x.view(len(self.active), self.batch, heads, self.chunk, dim).permute(1, 0, 3, 2, 4)
            tokens.copy_(x.reshape(self.batch, -1, heads, dim)[:, : self.num_tokens])
        else:
            filled = self.index < self.num_tokens
            tokens[0, self.index[filled]] = x.transpose(1, 2).reshape(-1, heads, dim)[filled].to(dtype)
        return tokens

    def to_ranks(self, states: Tensor) -> Tensor:
        """Rows in the sequences' order -> rows by rank (a copy, free to be overwritten)."""
        return states.clone() if self.order is None else states[self.order]

    def from_ranks(self, states: Tensor) -> Tensor:
        """The inverse of `to_ranks`."""
        if self.order is None:
            return states
        out = torch.empty_like(states)
        out[self.order] = states
        return out


def chunk_size(num_tokens: int, chunk: int) -> int:
    """The smallest power of two that holds all the tokens, at most `chunk` (itself a power of two)."""
    while chunk > 1 and chunk // 2 >= num_tokens:
        chunk //= 2
    return chunk


def max_chunks(batch: int, num_tokens: int, cu_seqlens: Tensor | None, chunk: int) -> int:
    """An upper bound on M that follows from shapes alone; exact for batch rows."""
    if cu_seqlens is None:
        return batch * -(-num_tokens // chunk)
    return (num_tokens + (cu_seqlens.shape[0] - 1) * (chunk - 1)) // chunk


def chunk_layout(x: Tensor, cu_seqlens: Tensor | None, chunk: int) -> ChunkLayout:
    """The layout of x [B, T, ...] in chunks of `chunk` tokens.

    Raises:
        ValueError: the values of cu_seqlens do not fit.
    """
    B, T = x.shape[:2]
    if cu_seqlens is None:
        return ChunkLayout(B, T, chunk, [B] * -(-T // chunk), None, None)
    borders = document_borders(cu_seqlens, T)
    counts = [-(-(end - start) // chunk) for start, end in pairwise(borders)]
    order = sorted(range(len(counts)), key=lambda d: -counts[d])
    active, chunks = [], []
    for i in range(max(counts, default=0)):
        documents = [d for d in order if counts[d] > i]
        active.append(len(documents))
        chunks += [(borders[d] + i * chunk, borders[d + 1]) for d in documents]
    first, end = torch.tensor(chunks, dtype=torch.int64, device=x.device).view(-1, 2).unbind(1)
    rows = first[:, None] + torch.arange(chunk, device=x.device)
    index = torch.where(rows < end[:, None], rows, T).flatten()
    return ChunkLayout(B, T, chunk, active, index, torch.tensor(order, dtype=torch.int64, device=x.device))
