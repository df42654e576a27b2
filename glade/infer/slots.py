"""Sequences that decode together, a token a step: a table of states and the one decode loop of the project.

`Slots` holds a row for each of `size` sequences. What is drawn, by which rules and with which seed is each row's own.
It knows nothing of text, queues or stopping: `decoding` and `engine` decide who sits where, and for how long.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from glade.infer.captured.graphs import Graphs
from glade.infer.config import SamplingParams
from glade.infer.rows import growing_layers, put, rest_, trim
from glade.infer.sampler import Rules, draw, gumbel_noise, rules_of
from glade.infer.step import decode_step
from glade.model.lm import LanguageModel
from glade.model.state import State
from glade.ops.attention import reserve

if TYPE_CHECKING:
    from glade.infer.captured.program import Binding, Program

# tokens that a growing layer has room for at first; it doubles from there
_MIN_ROOM = 64
_FREE = SamplingParams(temperature=0)


class Token(NamedTuple):
    """One drawn token: `logprob` is its log-probability (nats) under the model, before any sampling rule.

    It is nan where the model's logits are not finite; the token then has no meaning.
    """

    row: int  # index of its prompt, or its slot
    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely ids with their log-probabilities, best first


class _Batch(NamedTuple):
    """What a step needs to know of who sits where, on the device; it holds until a sequence comes or goes."""

    slots: Tensor | None  # [B] int64; None is all rows in order
    taken: list[int]  # the slot of each row of the batch that is somebody's, in the batch's order
    rows: Sequence[int]  # for each of `taken`, its row of the batch
    resting: Tensor  # the slots that are computed along although nobody sits there
    seeds: Tensor  # [B] int64
    # Rows that are drawn in one go. On the CPU each alone: it pays for its own rules and no others', and what it
    # works on stays in the cache.
    rules: list[tuple[slice, Rules]]
    tops: list[int]  # for each of `taken`, how many most likely tokens it reports
    program: "Program | None"  # of a GPU, to be recorded
    draw: Callable[..., Tensor] | None  # of a GPU, what draws and writes the report where nothing is put in order
    live: Tensor  # [B] int64: 1, or 0 where the row's slot is a resting one
    tensors: list[Tensor]  # what a recorded step reads of all this

    def of(self, tensors: Sequence[Tensor]) -> "_Batch":
        """The same with these in the place of `tensors`."""
        slots, live, seeds, temperature, top_k, top_p, min_p, penalty = tensors
        (part, rules), *_ = self.rules
        rules = rules._replace(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, penalty=penalty)
        return self._replace(slots=slots, live=live, seeds=seeds, rules=[(part, rules)])


class Slots:
    """A table of `size` rows: `fill` one, `step` all that are filled, `free` it again.

    The state of a filled row has read all of its tokens but the last, which `step` reads before it draws the next: so
    every draw, the first after a prompt included, comes out of the same loop.

    Args:
        vocab_size: ids from there on are never drawn (a model may have more ids than its tokenizer). Default: all
        max_room: most tokens that growing layers get room for, in every row; None is no limit
        padded: compute all `size` rows at every step, empty ones too, so that every product has the same shape and a
            row's bits do not depend on how many others there are
    """

    def __init__(
        self,
        model: LanguageModel,
        size: int,
        *,
        vocab_size: int | None = None,
        max_room: int | None = None,
        padded: bool = False,
    ) -> None:
        self.model, self.size, self.max_room, self.padded = model, size, max_room, padded
        self.vocab_size = vocab_size or cast(int, model.config.vocab_size)
        self.device = model.embed.weight.device
        self._decode = decode_step(model)
        # for whoever asks, from any thread
        self.path = self._decode.path + (f": {self._decode.reason}" if self._decode.reason else "")
        self.growing = growing_layers(model)
        self.state = model.init_state(size)
        self.unread = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.seen: Tensor | None = None
        self.params: list[SamplingParams | None] = [None] * size
        self._seeds = [0] * size
        self._read = [0] * size
        self._batch: _Batch | None = None
        self._graphs = Graphs(self.device)
        self._bound: Binding | None = None

    def fill(
        self, slot: int, state: State | None, unread: int, params: SamplingParams, seed: int, read: Iterable[int] = ()
    ) -> None:
        """A sequence sits down: its one-row `state` (None: nothing read) is copied in.

        Args:
            unread: its last token, that the state has not seen
            seed:   with the token's position, all that its noise depends on
            read:   the ids that a repetition penalty weakens besides `unread` and those to be drawn
        """
        assert self.params[slot] is None, slot
        state = self.model.init_state(1) if state is None else state
        self._read[slot] = int(state.position)
        self._make_room(self._read[slot])
        put(self.state, slot, state, self.growing)
        self.unread[slot] = unread
        self.params[slot], self._seeds[slot] = params, seed
        if params.repetition_penalty != 1:
            self._remember(slot, [*read, unread])
        self._batch = None

    def free(self, slots: Iterable[int]) -> None:
        """These sequences leave."""
        for slot in slots:
            self.params[slot] = None
            self._read[slot] = 0
            self._batch = None
            rest_(self.state, torch.tensor([slot], device=self.device))

    def take(self, slots: Sequence[int]) -> State:
        """A copy of what these rows have read: all their tokens but the last one drawn."""
        longest = max((self._read[slot] for slot in slots), default=0)
        return trim(self.state.select(list(slots)), longest, self.growing)

    def held(self) -> AbstractContextManager[None]:
        """Inside, the model's weights stay where they are (`glade.infer.step.Step.held`)."""
        return self._decode.held()

    @torch.no_grad()
    def step(self) -> list[Token]:
        """Read the unread token of every filled row and draw the next, in the order of the slots."""
        batch = self._batch = self._batch or self._seat()
        self._make_room(max(self._read) + 1)
        with evaluating(self.model):
            report = self._advance(batch) if batch.program is None else self._replay(batch, batch.program)
        for slot in batch.taken:
            self._read[slot] += 1
        return _tokens(report, batch)

    def _replay(self, batch: _Batch, program: "Program") -> Tensor:
        """`_advance` as one recorded graph."""
        bound = program.bind(self.state)
        if bound is not self._bound:
            self._graphs.clear()
            self._bound = bound
        rules = batch.rules[0][1]
        facts = (rules.drawn, rules.penalized, rules.widest, rules.whole)
        kind = (len(batch.live), *facts, max(batch.tops), self.seen is None)
        return self._graphs.run(kind, batch.tensors, lambda tensors: self._advance(batch.of(tensors)))

    def _advance(self, batch: _Batch) -> Tensor:
        """The step as tensor code. Returns what `_tokens` reads."""
        rows = slice(None) if batch.slots is None else batch.slots
        if batch.program is None or batch.slots is None:
            if len(batch.resting):
                rest_(self.state, batch.resting)
            logits = self._decode(self.unread[rows], self.state, batch.slots)
        else:
            # ids that were drawn or checked, in rows that have room: nothing here asks the device for a value
            logits = batch.program.enqueue(self.unread[rows], self.state, batch.slots, batch.live)
        logits = logits[:, : self.vocab_size]
        if batch.draw is not None and batch.slots is not None:
            (_, rules), *_ = batch.rules
            return batch.draw(logits, rules, batch.seeds, batch.slots, self.state.position, self.unread)
        positions = self.state.position[rows]
        penalized = self.seen is not None and any(rules.penalized for _, rules in batch.rules)
        seen = self.seen[rows] if self.seen is not None and penalized else None
        reports = [self._draw(logits[part].float(), rules, seen, part, batch, positions) for part, rules in batch.rules]
        report = torch.cat(reports)
        ids = report[:, 0]
        self.unread[rows] = ids
        if seen is not None and self.seen is not None:
            self.seen[rows] = seen.scatter(1, ids[:, None], True)
        return report

    def _draw(
        self, logits: Tensor, rules: Rules, seen: Tensor | None, part: slice, batch: _Batch, positions: Tensor
    ) -> Tensor:
        """Ids and log-probabilities of some rows, [B, 2 + 2 n]: whole numbers and the bits of fp32 side by side, so
        that everything crosses to the host in one copy.
        """
        seeds, positions = batch.seeds[part], positions[part]
        ids = draw(
            logits,
            rules,
            None if seen is None else seen[part],
            lambda ids: gumbel_noise(seeds, positions, self.vocab_size, ids),
        )
        logprobs = logits.log_softmax(dim=-1)
        best, best_ids = logprobs.topk(max(batch.tops), dim=-1)
        floats = torch.cat([logprobs.gather(1, ids[:, None]), best], dim=1).contiguous()
        return torch.cat([ids[:, None], best_ids, floats.view(torch.int32).to(torch.int64)], dim=1)

    def _seat(self) -> _Batch:
        taken = [slot for slot, params in enumerate(self.params) if params is not None]
        program = self._decode.captured
        rows = list(range(self.size)) if self.padded else taken
        if program is not None and not self.padded:
            # a power of two, filled up with slots where nobody sits: few sizes are recorded, and soon all of them
            free = (slot for slot, params in enumerate(self.params) if params is None)
            rows = [*taken, *islice(free, (1 << (len(taken) - 1).bit_length()) - len(taken))]
        params = [self.params[slot] or _FREE for slot in rows]
        alone = self.device.type == "cpu" and program is None
        size = 1 if alone else len(rows)
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
        rules = [rules_of(params[part], self.vocab_size, self.device) for part in parts]
        if program is not None:
            rules = [each._replace(widest=_rounded_up(each.widest, self.vocab_size)) for each in rules]
        everybody = len(rows) == self.size and program is None
        slots, live, seeds = torch.tensor(
            [rows, [self.params[slot] is not None for slot in rows], [self._seeds[slot] for slot in rows]],
            device=self.device,
        )
        tensors = [slots, live, seeds, *rules[0][:5]]
        tops = [min(params.logprobs, self.vocab_size) for params in self.params if params is not None]
        # the few kernels sum a log-probability in their own order: padded, its bits would tell what rules others have
        drawing = None if program is None or self.padded else program.drawing(rules[0], max(tops))
        return _Batch(
            slots=None if everybody else slots,
            taken=taken,
            rows=taken if self.padded else range(len(taken)),
            resting=torch.tensor([slot for slot in rows if self.params[slot] is None], device=self.device).long(),
            seeds=seeds,
            rules=list(zip(parts, rules, strict=True)),
            tops=tops,
            program=program,
            draw=drawing,
            live=live,
            tensors=tensors,
        )

    def _make_room(self, tokens: int) -> None:
        """Growing layers hold `tokens` tokens a row, and twice as many as before if they have to grow."""
        if not any(self.growing):
            return
        room = self.room
        if tokens > room:
            room = max(tokens, min(max(2 * room, _MIN_ROOM), self.max_room or sys.maxsize))
            self.state.layers = tuple(
                reserve(layer, room) if grows else layer
                for layer, grows in zip(self.state.layers, self.growing, strict=True)
            )

    @property
    def room(self) -> int:
        """Tokens that every row's growing layers have room for; 0 without such layers."""
        return max((x.k.shape[1] for x, grows in zip(self.state.layers, self.growing, strict=True) if grows), default=0)

    def _remember(self, slot: int, ids: list[int]) -> None:
        if self.seen is None:
            self.seen = torch.zeros(self.size, self.vocab_size, dtype=torch.bool, device=self.device)
        self.seen[slot] = False
        self.seen[slot, torch.tensor(ids, device=self.device)] = True


def _tokens(report: Tensor, batch: _Batch) -> list[Token]:
    """The drawn ids on the host; the one place where a step waits for the device."""
    table = report.cpu().numpy()
    half = table.shape[1] // 2
    numbers, floats = table.tolist(), table[:, half:].astype(np.int32).view(np.float32).tolist()
    tokens = []
    for slot, row, num_top in zip(batch.taken, batch.rows, batch.tops, strict=True):
        logprob, *best = floats[row][: 1 + num_top]
        id, *best_ids = numbers[row][: 1 + num_top]
        tokens.append(Token(slot, id, logprob, tuple(zip(best_ids, best, strict=True))))
    return tokens


def _rounded_up(width: int, most: int) -> int:
    """To a power of two, so that a top-k of 40 and one of 50 are one kind of step."""
    return min(1 << (width - 1).bit_length(), most) if width else 0


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """No dropout inside, the model's mode as it was outside: a trainer may ask for samples at any moment."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
