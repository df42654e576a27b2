"""Sizes, kinds of gates and block sizes of one call: what all launches are given alike."""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import torch
import triton.language as tl
from torch import Tensor

from glade.ops.linear_attention.chunk_layout import max_chunks
from glade.ops.linear_attention.triton.configs import MULTIPROCESSORS, Launch, config_for
from glade.ops.linear_attention.triton.launch import (
    Chunks,
    Segments,
    check_key_dim,
    chunks_of,
    kind_of,
    segments_of,
)
from glade.ops.linear_attention.triton.sums import sum_of_programs
from glade.ops.parts import gradient_like

# `wgmma` takes 64 rows: programs of fewer value channels only where half of the processors would have none
FEW_PROGRAMS, ENOUGH_PROGRAMS = MULTIPROCESSORS // 2, 2 * MULTIPROCESSORS
# Sequences are cut into segments (`Call.segment`) of at least so many chunks, so many a sequence on average:
# the first pass over a segment takes up to as long as the second.
LEAST_CHUNKS = 16
LEAST_SEGMENTS = 4

TRITON_TYPE = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


class Call:
    def __init__(self, q: Tensor, v: Tensor, g, erase, write, cu_seqlens: Tensor | None):
        check_key_dim(q)
        self.B, self.T, self.HV, self.V = v.shape
        self.H, self.K = q.shape[2:]
        self.gate, self.erase, self.write = (kind_of(x, 4) for x in (g, erase, write))
        self.KP, self.VP = (max(16, 1 << (n - 1).bit_length()) for n in (self.K, self.V))  # powers of two
        self.config, numbers = config_for(
            (self.gate, self.erase, self.write), v.dtype, self.T, self.KP, self.VP, v.device
        )
        self.chunk, self.span = self.config.chunk, self.config.span
        self.dtype, self.sum_dtype, self.precision = numbers
        self.packed = cu_seqlens is not None
        self.segment = self._chunks_a_segment(self.B if cu_seqlens is None else len(cu_seqlens) - 1)
        length = self.chunk * self.segment
        self.num_segments = max_chunks(self.B, self.T, cu_seqlens, length) if length else 0

    def _chunks_a_segment(self, sequences: int) -> int:
        """Chunks of a segment where the passes over states take sequences in segments; 0 where they take them whole.

        Segments are made where programs would be fewer than FEW_PROGRAMS: the fewest that give each processor two.
        It follows from shapes alone.
        """
        programs = self.HV * max(1, self.VP // self.config.forward.block)  # of a sequence, or a segment
        if not 0 < programs * sequences < FEW_PROGRAMS:
            return 0
        chunks = self.B * -(-self.T // self.chunk)
        segments = min(-(-ENOUGH_PROGRAMS // programs), chunks // LEAST_CHUNKS)
        if segments < LEAST_SEGMENTS * sequences:
            return 0
        return -(-chunks // (segments * self.span)) * self.span

    @property
    def changes_values(self) -> bool:
        """Whether what a token writes is anything but v."""
        return self.erase > 0 or self.write > 0

    @property
    def group(self) -> int:
        return self.HV // self.H

    @property
    def num_token_heads(self) -> int:
        return self.B * self.T * self.HV

    @property
    def types(self) -> dict:
        return dict(DTYPE=TRITON_TYPE[self.dtype], PRECISION=self.precision)

    @property
    def levels(self) -> int:
        return self.chunk.bit_length() - 1

    @property
    def keys_block(self) -> int:
        """Key channels that a program of keys takes, at a time or in all."""
        return min(self.KP, self.config.keys.block)

    def value_block(self, launch: Launch, chunks: Chunks, enough: int) -> int:
        """How many value channels a program of a pass over states takes: fewer, while there are not enough programs."""
        block = min(self.VP, launch.block)
        while block > 16 and chunks.sequences * self.HV * (self.VP // block) < enough:
            block //= 2
        return block

    def spans_and_segments(
        self, v: Tensor, cu_seqlens: Tensor | None, chunks: Chunks
    ) -> tuple[Chunks, Segments | None]:
        """The spans of chunks that the backward takes together, and the segments, where sequences are cut."""
        spans = chunks if self.span == 1 else chunks_of(v, cu_seqlens, self.chunk * self.span)
        return spans, segments_of(v, cu_seqlens, chunks, spans, self.segment) if self.segment else None

    def counts(self, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
        """How many chunks and spans `chunks_of` makes."""
        chunks, spans = (max_chunks(*v.shape[:2], cu_seqlens, n) for n in (self.chunk, self.chunk * self.span))
        return chunks, spans

    def where(self, chunks: Chunks) -> tuple:
        return chunks.starts, chunks.ends, self.T, chunks.a_row

    def along(self, chunks: Chunks) -> tuple:
        return chunks.starts, chunks.ends, self.T, *self.in_sequence(chunks)

    @staticmethod
    def in_sequence(chunks: Chunks) -> tuple:
        return chunks.firsts, chunks.a_row, chunks.a_sequence

    def gradient_of_keys(self, x: Tensor) -> Tensor:
        """Empty, for what the programs of each value head write: sums over a group of heads follow in fp32."""
        if self.group == 1:
            return gradient_like(x)
        return x.new_empty(self.B, self.T, self.HV, self.K, dtype=torch.float32)

    def over_group(self, dx: Tensor, x: Tensor) -> Tensor:
        return dx if self.group == 1 else dx.unflatten(2, (self.H, self.group)).sum(3).to(x.dtype)

    def gradient_in_parts(self, x: Tensor | None, parts: int) -> Tensor | None:
        """Empty, for the gradient of a gate: where it is scalar a part for each block of channels, fp32 if they are to
        be added up."""
        if x is None:
            return None
        if x.dim() == 4:
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        return x.new_empty(parts, *x.shape, dtype=torch.float32 if parts > 1 else x.dtype)


def sum_of_parts(dx: Tensor | None, x: Tensor | None) -> Tensor | None:
    if dx is None or x is None or x.dim() == 4:
        return dx
    return dx[0] if len(dx) == 1 else sum_of_programs(dx, x.dtype)


def token_stride(dx: Tensor) -> int:
    """Elements from a token's gradient to the next one's, heads beside each other (`gradient_like`); batch rows follow
    as tokens do."""
    return dx.stride(1)
