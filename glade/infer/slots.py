"""Sequences that decode together, a token a step: a table of states and the one decode loop of the project.

`Slots` holds a row for each of `size` sequences. What is drawn, by which rules and with which seed is each row's own.
It knows nothing of text, queues or stopping: `decoding` and `engine` decide who sits where, and for how long.
"""

import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from glade.infer.captured.graphs import Graphs
from glade.infer.config import SamplingParams
from glade.infer.endings import Endings
from glade.infer.rows import growing_layers, put, rest_, row_of, trim
from glade.infer.sampler import Rules, Settings, draw, gumbel_noise, rules_of, rules_of_each, settings_of
from glade.infer.step import decode_step
from glade.infer.transfer import Report, Token, sent
from glade.model.lm import LanguageModel
from glade.model.state import State
from glade.ops.attention import reserve

if TYPE_CHECKING:
    from glade.infer.captured.program import Binding, Program

# tokens that a growing layer has room for at first; it doubles from there
_MIN_ROOM = 64
_FREE = settings_of(SamplingParams(temperature=0), 1)


class _Batch(NamedTuple):
    """What a step needs to know of who sits where, on the device; it holds until a sequence comes or goes."""

    slots: Tensor | None  # [B] int64; None is all rows in order
    taken: list[int]  # the slot of each row of the batch that is somebody's, in the batch's order
    rows: slice | list[int]  # for each of `taken`, its row of the batch
    resting: Tensor  # the slots that are computed along although nobody sits there
    seeds: Tensor  # [B] int64
    # Rows that are drawn in one go. On the CPU each alone: it pays for its own rules and no others', and what it
    # works on stays in the cache.
    rules: list[tuple[slice, Rules]]
    tops: list[int]  # for each of `taken`, how many most likely tokens it reports
    most_tops: int
    program: "Program | None"  # of a GPU, to be recorded
    kind: Hashable  # of recorded steps, those that do the same
    draw: Callable[..., Tensor] | None  # of a GPU, what draws and writes the report where it is few kernels
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
        padded: compute all `size` rows at every step, empty ones too, so that every product has the same shape and a
            row's bits do not depend on how many others there are
        ahead: where a GPU's recorded step decodes, launch a step before the tokens of the one before it are handed
            over, so that the device is never idle. Each filled row then draws `max_new_tokens` at most, and must be
            freed once its last token was handed over: it has stepped aside by then (`Endings`)
    """

    def __init__(
        self,
        model: LanguageModel,
        size: int,
        *,
        vocab_size: int | None = None,
        padded: bool = False,
        ahead: bool = False,
    ) -> None:
        self.model, self.size, self.padded = model, size, padded
        # most tokens that growing layers get room for, in every row; None is no limit
        self.max_room: int | None = None
        self.vocab_size = vocab_size or cast(int, model.config.vocab_size)
        self.device = model.embed.weight.device
        self._decode = decode_step(model)
        # for whoever asks, from any thread
        self.path = self._decode.path + (f": {self._decode.reason}" if self._decode.reason else "")
        self.growing = growing_layers(model)
        self._endings = Endings(size, self.device) if ahead and self._decode.captured is not None else None
        self.state = model.init_state(size + (self._endings is not None))
        self.unread = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.seen: Tensor | None = None
        self.params: list[SamplingParams | None] = [None] * size
        self._settings: list[Settings] = [_FREE] * size
        self._seeds = [0] * size
        # tokens, of all steps launched, and how many there are when the last one is drawn
        self._read, self._last = [0] * size, [0] * size
        self._batch: _Batch | None = None
        self._under_way: Report | None = None
        self._graphs = Graphs(self.device)
        self._bound: Binding | None = None

    def fill(
        self,
        slot: int,
        state: State | None,
        unread: int,
        params: SamplingParams,
        seed: int,
        read: Iterable[int] = (),
        stop_ids: Collection[int] = (),
    ) -> None:
        """A sequence sits down: its one-row `state` (None: nothing read) is copied in.

        Args:
            unread: its last token, that the state has not seen
            seed:   with the token's position, all that its noise depends on
            read:   the ids that a repetition penalty weakens besides `unread` and those to be drawn
            stop_ids: after any of these, its state must stay as it is: asked only of `ahead`
        """
        assert self.params[slot] is None, slot
        state = self.model.init_state(1) if state is None else state
        self._read[slot], self._last[slot] = int(state.position), sys.maxsize
        if self._endings is not None:
            self._last[slot] = self._read[slot] + params.max_new_tokens
            self._endings.begin(slot, self._last[slot], stop_ids)
        self._make_room(self._read[slot])
        put(self.state, slot, state, self.growing)
        self.unread[slot] = unread
        self.params[slot], self._seeds[slot] = params, seed
        self._settings[slot] = settings_of(params, self.vocab_size)
        if params.repetition_penalty != 1:
            self._remember(slot, [*read, unread])
        self._batch = None

    def free(self, slots: Collection[int]) -> None:
        """These sequences leave."""
        if not slots:
            return
        for slot in slots:
            self.params[slot], self._settings[slot] = None, _FREE
            self._read[slot] = self._last[slot] = 0
        self._batch = None
        if self._under_way is not None:
            self._under_way.left.update(slots)
        spare = [] if self._endings is None else [self._endings.spare]
        rest_(self.state, sent(torch.tensor([*slots, *spare]), self.device))

    def take(self, slots: Sequence[int]) -> State:
        """A copy of what these rows have read: all their tokens but the last one drawn.

        With `ahead`, of rows whose last token was handed over: the others may be a token further.
        """
        aside = () if self._under_way is None else self._under_way.taken
        longest = max((self._read[slot] - (slot in aside) for slot in slots), default=0)
        if len(slots) == 1:
            return trim(row_of(self.state, slots[0]), longest, self.growing)
        return trim(self.state.select(sent(torch.tensor(slots), self.device).long()), longest, self.growing)

    def held(self) -> AbstractContextManager[None]:
        """Inside, the model's weights stay where they are (`glade.infer.step.Step.held`)."""
        return self._decode.held()

    @torch.no_grad()
    def step(self) -> list[Token]:
        """Read the unread token of every filled row and draw the next, in the order of the slots.

        With `ahead`, the tokens are those of the step before, of rows that have not been freed since, and the step
        launched now is under way: the first time there are none.
        """
        batch = self._batch = self._batch or self._seat()
        if self._endings is None or batch.program is None:
            return self.settle() or self._launch(batch).tokens()
        before = self._under_way
        goes_on = any(self._read[slot] < self._last[slot] for slot in batch.taken)
        self._under_way = self._launch(batch) if goes_on else None
        return [] if before is None else before.tokens()

    def settle(self) -> list[Token]:
        """The tokens of the step under way, if one is, and no new step."""
        before, self._under_way = self._under_way, None
        return [] if before is None else before.tokens()

    def _launch(self, batch: _Batch) -> Report:
        if any(self.growing):
            self._make_room(max(map(min, (read + 1 for read in self._read), self._last)))
        with evaluating(self.model):
            table = self._advance(batch) if batch.program is None else self._replay(batch, batch.program)
        for slot in batch.taken:
            self._read[slot] += 1
        return Report(table, batch.taken, batch.rows, batch.tops)

    def _replay(self, batch: _Batch, program: "Program") -> Tensor:
        """`_advance` as one recorded graph."""
        bound = program.bind(self.state)
        if bound is not self._bound:
            if self._under_way is not None:
                self._under_way.wait()
            self._graphs.clear()
            self._bound = bound
        return self._graphs.run(batch.kind, batch.tensors, lambda tensors: self._advance(batch.of(tensors)))

    def _advance(self, batch: _Batch) -> Tensor:
        """The step as tensor code. Returns what `Report` reads."""
        rows = slice(None) if batch.slots is None else batch.slots
        if batch.program is None or batch.slots is None:
            if len(batch.resting):
                rest_(self.state, batch.resting)
            logits = self._decode(self.unread[rows], self.state, batch.slots)
        else:
            # ids that were drawn or checked, in rows that have room: nothing here asks the device for a value
            places = batch.slots if self._endings is None else self._endings.places(batch.slots)
            logits = batch.program.enqueue(self.unread[rows], self.state, places, batch.live)
        logits = logits[:, : self.vocab_size]
        if batch.draw is not None and batch.slots is not None:
            (_, rules), *_ = batch.rules
            return batch.draw(logits, rules, batch.seeds, batch.slots, self.state.position, self.unread, self._endings)
        positions = self.state.position[rows]
        penalized = self.seen is not None and any(rules.penalized for _, rules in batch.rules)
        seen = self.seen[rows] if self.seen is not None and penalized else None
        reports = [self._draw(logits[part].float(), rules, seen, part, batch, positions) for part, rules in batch.rules]
        report = torch.cat(reports) if len(reports) > 1 else reports[0]
        ids = report[:, 0]
        self.unread[rows] = ids
        if self._endings is not None and batch.slots is not None:
            self._endings.step_aside_(batch.slots, ids, positions)
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
        )[:, None]
        logprobs = logits.log_softmax(dim=-1)
        floats = logprobs.gather(1, ids)
        if batch.most_tops:
            best, best_ids = logprobs.topk(batch.most_tops, dim=-1)
            ids, floats = torch.cat([ids, best_ids], dim=1), torch.cat([floats, best], dim=1)
        return torch.cat([ids, floats.view(torch.int32).to(torch.int64)], dim=1)

    def _seat(self) -> _Batch:
        taken = [slot for slot, params in enumerate(self.params) if params is not None]
        program = self._decode.captured
        rows = list(range(self.size)) if self.padded else taken
        if program is not None and not self.padded:
            # a power of two, filled up with slots where nobody sits: few sizes are recorded, and soon all of them
            free = (slot for slot, params in enumerate(self.params) if params is None)
            rows = [*taken, *islice(free, (1 << (len(taken) - 1).bit_length()) - len(taken))]
        settings = [self._settings[slot] for slot in rows]
        size = len(rows)
        if self.device.type == "cpu" and program is None:
            size, rules = 1, rules_of_each(settings, self.device)
        else:
            rules = [rules_of(settings, self.device)]
        if program is not None:
            rules = [each._replace(widest=_rounded_up(each.widest, self.vocab_size)) for each in rules]
        everybody = len(rows) == len(self.state) and program is None
        live = [self.params[slot] is not None for slot in rows]
        slots, occupied, seeds = sent(torch.tensor([rows, live, [self._seeds[slot] for slot in rows]]), self.device)
        resting = [] if program is not None else [slot for slot, taken in zip(rows, live, strict=True) if not taken]
        tops = [min(params.logprobs, self.vocab_size) for params in self.params if params is not None]
        most_tops = max(tops)
        # few kernels sum a log-probability in their own order: padded, its bits would tell what rules others have
        draw = None if program is None or self.padded else program.drawing(rules[0], most_tops)
        # what there is to do: those kernels do the same however many tokens are left
        work = rules[0][5:] if draw is None else (rules[0].drawn, rules[0].widest > 0)
        return _Batch(
            slots=None if everybody else slots,
            taken=taken,
            rows=taken if self.padded else slice(len(taken)),
            resting=sent(torch.tensor(resting, dtype=torch.int64), self.device),
            seeds=seeds,
            rules=list(zip((slice(start, start + size) for start in range(0, len(rows), size)), rules, strict=True)),
            tops=tops,
            most_tops=most_tops,
            program=program,
            kind=(len(rows), *work, most_tops, self.seen is None, self._endings and self._endings.most_stops),
            draw=draw,
            live=occupied,
            tensors=[slots, occupied, seeds, *rules[0][:5]],
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
