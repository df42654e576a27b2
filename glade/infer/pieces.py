"""Pieces of prompts read in one packed call, each going on from its own state; on a GPU the call is a CUDA graph.

A GPU is through with the kernels of a piece before Python has started them. So the pieces are filled up to one of few
sizes (tokens of padding are a document of their own, and documents without a token follow), the first call of a size
runs as it is, the second is recorded, and from then on the record is replayed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glade.infer.captured.graphs import Graphs
from glade.infer.rows import join, row_of, split
from glade.infer.slots import evaluating
from glade.model.lm import LanguageModel
from glade.model.mixers.attention import Attention
from glade.model.mixers.linear import Linear
from glade.model.state import State
from glade.ops.attention import flash
from glade.ops.packing import asked_once_a_recording, declare_longest, rounded_up

MOST_SIZES = 16  # that are kept, each with the states it begins with and those it ends with
MOST_DOCUMENTS = 4  # of a recorded call, padding counted: many short prompts keep a GPU busy as they are


class Pieces:
    """Reads pieces of prompts with `model`; `growing` is `growing_layers(model)`."""

    def __init__(self, model: LanguageModel, growing: Sequence[bool]) -> None:
        self.model, self.growing = model, growing
        self._none = model.init_state(1)
        device = model.embed.weight.device
        self._graphs = Graphs(device, MOST_SIZES) if device.type == "cuda" and _is_recorded(model, growing) else None

    @torch.no_grad()
    def read(self, pieces: Sequence[Sequence[int]], states: Sequence[State | None]) -> list[State]:
        """The one-row state after each of `pieces` (at least one id each), read on from `states`; None is the start.

        A state given is left as it is, so it may be kept.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        if self._graphs is None or len(pieces) >= MOST_DOCUMENTS:
            return self._read(pieces, states)
        self._check(pieces)
        num_tokens = sum(map(len, pieces))
        T, N = rounded_up(num_tokens, 4), rounded_up(len(pieces) + 1, 4)
        ids = [id for piece in pieces for id in piece] + [0] * (T - num_tokens)
        borders = [0]
        for piece in pieces:
            borders.append(borders[-1] + len(piece))
        borders += [T] * (N - len(pieces))
        device = self.model.embed.weight.device
        rows = [self._none if state is None else state for state in states] + [self._none] * (N - len(pieces))
        before = join(rows, self.growing)
        tensors = [
            torch.tensor([ids]).to(device, non_blocking=True),
            torch.tensor(borders, dtype=torch.int32).to(device, non_blocking=True),
            *before.tensors(),
        ]
        after = self._none.with_tensors(self._graphs.run((T, N), tensors, self._function))
        # copies: the next call overwrites what this one answers
        return [row_of(after, i) for i in range(len(pieces))]

    def _read(self, pieces: Sequence[Sequence[int]], states: Sequence[State | None]) -> list[State]:
        device = self.model.embed.weight.device
        ids = torch.tensor([[id for piece in pieces for id in piece]], device=device)
        before = None
        if any(state is not None for state in states):
            before = join([self._none if state is None else state for state in states], self.growing)
        cu_seqlens = None
        if len(pieces) > 1:
            cu_seqlens = torch.tensor([0, *map(len, pieces)], device=device).cumsum(0).to(torch.int32)
        with evaluating(self.model):
            _, after = self.model(ids, before, cu_seqlens=cu_seqlens, logits="none")
        return split(after, after.position.tolist(), self.growing)

    def _function(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What is recorded: the state's tensors after the tokens."""
        ids, cu_seqlens, *before = inputs
        declare_longest(cu_seqlens, ids.shape[1])
        with evaluating(self.model), asked_once_a_recording():
            _, after = self.model(ids, self._none.with_tensors(before), cu_seqlens=cu_seqlens, logits="none")
        return after.tensors()

    def _check(self, pieces: Sequence[Sequence[int]]) -> None:
        """What a recording cannot look at, and a GPU would stop for."""
        vocab = self.model.config.vocab_size
        assert vocab is not None
        wrong = next((id for piece in pieces for id in piece if not 0 <= id < vocab), None)
        if wrong is not None:
            raise ValueError(f"ids holds {wrong}; the vocabulary has {vocab} entries, 0 to {vocab - 1}")


def _is_recorded(model: LanguageModel, growing: Sequence[bool]) -> bool:
    """Whether nothing that a call does follows from values: experts, room that grows, networks stepped from the CPU,
    attention by blocks of documents, and the bound of learned positions."""
    if any(growing) or model.config.ffn == "moe" or model.config.learned_positions:
        return False
    narrow = model.embed.weight.dtype in (torch.bfloat16, torch.float16)
    for block in model.blocks():
        mixer = block.mixer
        if isinstance(mixer, Attention):
            if not narrow or not flash.takes(mixer.options.head_dim, mixer.options.head_dim_v):
                return False
        elif not isinstance(mixer, Linear):
            return False
    return True
