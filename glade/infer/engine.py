"""Continuous batching: requests come and go, and every step decodes one token for all that run.

A step takes in waiting requests, reads at most one chunk of prompts, and decodes one token for every running sequence:
a long prompt never holds up the others' tokens for longer than a chunk takes. `Slots` draws, `read` reads; here is who
gets which slot, when, and why an answer ends.

On a GPU a decode step has two phases, a step apart: it is launched, and while the next one computes, its tokens are
collected and handed over. What an ended answer leaves behind does not know of the step launched too many: its slot has
stepped aside on the device (`glade.infer.endings`).
"""

import heapq
import logging
import math
import secrets
import threading
from collections import deque
from collections.abc import Callable
from itertools import chain

from glade.errors import ConfigError, DataError, GladeError
from glade.infer.limits import check_length, check_prompt, longest_sequence
from glade.infer.prefill import PromptReader
from glade.infer.prefix_cache import PrefixCache
from glade.infer.request import Busy, Delta, Ending, EngineStats, Request, Ticket
from glade.infer.slots import Slots
from glade.infer.transfer import Token
from glade.model.lm import LanguageModel
from glade.model.state import State, check_state

__all__ = ["Busy", "Delta", "Engine", "EngineStats", "Request", "Ticket", "check_length", "check_prompt"]

_log = logging.getLogger(__name__)


class _Sequence:
    """A request in a slot."""

    def __init__(self, ticket: Ticket, slot: int) -> None:
        self.ticket, self.slot, self.request = ticket, slot, ticket.request
        self.drawn: list[int] = []
        self.cached_tokens = 0
        seed = self.request.params.seed
        self.seed = secrets.randbits(62) if seed is None else seed

    def has_read(self) -> tuple[int, ...]:
        """All its tokens but the last one drawn."""
        return (*self.request.prompt, *self.drawn[:-1])


class Engine:
    """Serves one model to many requests at once.

        with Engine(model) as engine:
            ticket = engine.submit(Request(prompt=ids, params=SamplingParams(seed=1)), print)

    Noise depends on a request's (seed, position) alone. Equal prompts that come together are read once. A request that
    fails ends alone, with finished="error".

    Args:
        max_batch:      sequences that run at once; the table of states has a row for each
        max_waiting:    requests that may wait for a slot; beyond, `submit` raises `Busy`
        prefill_tokens: most tokens of prompts read in a step, and the distance of the snapshots taken of a long prompt;
            None is 2,048, and 16,384 on a GPU, which takes that many to be as fast as in training
        cache_bytes:    bound of the prefix cache; 0 keeps nothing
        max_state_bytes: bound of the keys and values of full attention, all rows together (on a GPU there is a spare
            one); it decides the longest sequence that is taken in. Other layers do not grow
        vocab_size:     the tokenizer's; ids from there on are never drawn. Default: all of the model's
        deterministic:  the bits of an answer are a function of its request: every decode step computes `max_batch`
            rows, every prompt is read alone, in chunks counted from its start, and only snapshots at the ends of such
            chunks are used again. Slower
    Raises:
        ConfigError: a number out of its range; `deterministic` with a mixture of experts, whose products have the
            shapes that the whole batch's routing gives them.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_batch: int = 64,
        max_waiting: int = 256,
        prefill_tokens: int | None = None,
        cache_bytes: int = 2**28,
        max_state_bytes: int = 2**33,
        vocab_size: int | None = None,
        deterministic: bool = False,
    ) -> None:
        if prefill_tokens is None:
            prefill_tokens = 16384 if model.embed.weight.is_cuda else 2048
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("max_waiting", max_waiting, 0),
            ("prefill_tokens", prefill_tokens, 1),
            ("cache_bytes", cache_bytes, 0),
            ("max_state_bytes", max_state_bytes, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if deterministic and model.config.num_experts:
            raise ConfigError("deterministic does not go with a mixture of experts: leave deterministic out")
        self.model, self.max_batch, self.max_waiting = model, max_batch, max_waiting
        self.prefill_tokens, self.deterministic = prefill_tokens, deterministic
        self._slots = Slots(model, max_batch, vocab_size=vocab_size, padded=deterministic, ahead=True)
        self.max_tokens = longest_sequence(model, len(self._slots.state), max_state_bytes)
        self._slots.max_room = self.max_tokens
        if self._slots.path not in ("native", "captured"):
            _log.warning("decoding is slower than it could be: %s", self._slots.path)
        self._cache = PrefixCache(cache_bytes, self._slots.growing)
        self._prompts = PromptReader[_Sequence](model, self._cache, self._slots.growing, prefill_tokens, deterministic)
        self._free = list(range(max_batch))
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, _Sequence] = {}
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._changed = threading.Condition()  # guards _waiting and _closed
        self._closed = False
        self._stepping = threading.Lock()
        self._stepper: int | None = None  # the thread inside `step`
        self._thread: threading.Thread | None = None

    def submit(self, request: Request, on_delta: Callable[[Delta], None]) -> Ticket:
        """Take a request in. `on_delta` is called for each token, from the thread that steps. From any thread.

        Raises:
            Busy: `max_waiting` requests wait already.
            DataError: an empty prompt, or an id that the model does not have.
            ConfigError: more tokens than the model has learned positions, or than the state may grow to.
            CheckpointError: `request.state` is not one row of this model's.
            GladeError: the engine is closed.
        """
        self._check(request)
        ticket = Ticket(request, on_delta)
        with self._changed:
            if self._closed:
                raise GladeError("the engine is closed; make another one")
            if len(self._waiting) >= self.max_waiting + len(self._free):
                raise Busy(f"{len(self._waiting)} requests wait already, the most that may; try again later")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def step(self) -> bool:
        """One step of everything; False if there was nothing to do. For tests, measurements and work without a thread.

        A model that raises ends the sequences it was computing, not the engine.
        """
        with self._stepping:
            if not self._has_work():
                return False
            self._stepper = threading.get_ident()
            try:
                self._drop_cancelled()
                self._admit()
                self._read_prompts()
                self._decode()
                if self._closed:
                    self._end_all(_CANCELLED)
            finally:
                self._stepper = None
            self._steps += 1
            return True

    def start(self) -> "Engine":
        """A thread of the engine's own calls `step` from now on, and sleeps while there is nothing to do."""
        with self._changed:
            if self._closed or self._thread is not None:
                raise GladeError("the engine is closed or has been started already; make another one")
            self._thread = threading.Thread(target=self._run, name="glade-engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """End everything with "cancelled" and stop the thread. From any thread, also twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._stepper == threading.get_ident():
            return  # a listener calls: the step that called it ends everything
        if self._thread is not None:
            self._thread.join()
        with self._stepping:
            self._end_all(_CANCELLED)

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether a thread of its own is serving: started, and neither closed nor failed."""
        return self._thread is not None and self._thread.is_alive() and not self._closed

    def stats(self) -> EngineStats:
        """Counts and sizes. From any thread."""
        return EngineStats(
            slots=self.max_batch,
            running=len(self._running),
            prefilling=len(self._prompts),
            waiting=len(self._waiting),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            state_bytes=self._slots.state.nbytes,
            cache_bytes=self._cache.nbytes,
            cached_prefixes=len(self._cache),
            decode=self._slots.path,
        )

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._has_work():
                    self._changed.wait()
                if self._closed:
                    return
            try:
                self.step()
            except Exception as error:
                # a fault of the engine's own: nobody may be left waiting for an answer that never comes
                _log.exception("the engine failed; all requests end, and it serves no more")
                with self._changed:
                    self._closed = True
                with self._stepping:
                    self._end_all(Delta(-1, finished="error", error=f"the engine failed: {error}"))
                raise

    def _has_work(self) -> bool:
        return bool(self._waiting or len(self._prompts) or self._running)

    def _check(self, request: Request) -> None:
        read_before = 0
        if request.state is not None:
            check_state(self.model.init_state(0), request.state, "state")
            if len(request.state) != 1:
                raise DataError(f"state has {len(request.state)} rows; a request goes on from one: state.select([i])")
            read_before = int(request.state.position)
        check_prompt(request.prompt, self._slots.vocab_size)
        check_length(self.model, read_before + len(request.prompt), request.params.max_new_tokens, self.max_tokens)

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in dropped:
                self._waiting.remove(ticket)
        for ticket in dropped:
            _call(ticket, _CANCELLED)
        for sequence in [s for s in chain(self._running.values(), self._prompts.owners()) if s.ticket.cancelled]:
            self._end(sequence, _CANCELLED)

    def _end_all(self, last: Delta) -> None:
        with self._changed:
            dropped = tuple(self._waiting)
            self._waiting.clear()
        for ticket in dropped:
            _call(ticket, last)
        for sequence in [*self._running.values(), *self._prompts.owners()]:
            self._end(sequence, last)

    def _admit(self) -> None:
        while self._free:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            sequence = _Sequence(ticket, heapq.heappop(self._free))
            request = ticket.request
            self._prompt_tokens += len(request.prompt)
            self._prompts.add(request.prompt[:-1], request.state, sequence)

    def _read_prompts(self) -> None:
        if not len(self._prompts):
            return
        # tokens that are drawn already do not wait for a chunk to be read
        self._collect(self._slots.settle)
        for done in self._prompts.step():
            if done.error is not None:
                _log.error("a prompt could not be read; its request ends", exc_info=done.error)
                error = f"the prompt could not be read: {done.error}"
                self._end(done.owner, Delta(-1, finished="error", error=error))
                continue
            done.owner.cached_tokens = done.cached_tokens
            self._cached_tokens += done.cached_tokens
            self._begin(done.owner, done.state)

    def _begin(self, sequence: _Sequence, state: State | None) -> None:
        request = sequence.request
        self._slots.fill(
            sequence.slot, state, request.prompt[-1], request.params, sequence.seed, request.prompt, request.stop_ids
        )
        self._running[sequence.slot] = sequence

    def _decode(self) -> None:
        if self._running:
            self._collect(self._slots.step)

    def _collect(self, draw: Callable[[], list[Token]]) -> None:
        """Hand on what `draw` says was drawn. If it raises, all that run end."""
        try:
            tokens = draw()
        except Exception as error:
            _log.exception("a decode step failed; the sequences in it end")
            # of the step before, if that one did not fail, too
            self._collect(self._slots.settle)
            # half the layers may have read the token, so no state is what it should be
            for sequence in tuple(self._running.values()):
                self._end(sequence, Delta(-1, finished="error", error=f"the decode step failed: {error}"))
            return
        for token in tokens:
            self._pass_on(self._running[token.row], token)

    def _pass_on(self, sequence: _Sequence, token: Token) -> None:
        """Hand a drawn token to its request, and end the request if it was the last."""
        _, id, logprob, top = token
        if math.isnan(logprob):
            error = "the model's logits are not finite; the weights are damaged or overflow"
            self._end(sequence, Delta(-1, finished="error", error=error))
            return
        request, drawn = sequence.request, sequence.drawn
        drawn.append(id)
        self._generated_tokens += 1
        finished: Ending | None = None
        if id in request.stop_ids:
            finished = "eos"
        elif len(drawn) == request.params.max_new_tokens:
            finished = "length"
        delta = Delta(id, logprob, top, finished, sequence.cached_tokens if len(drawn) == 1 else 0)
        if finished is None:
            if not _call(sequence.ticket, delta):
                self._end(sequence, Delta(-1, finished="error", error="the listener failed"))
            return
        self._end(sequence, delta._replace(state=self._leave_state(sequence)))

    def _leave_state(self, sequence: _Sequence) -> State | None:
        """What a finished sequence has read: for its request, if it wants it, and for those that go on from it."""
        request = sequence.request
        keeps = request.state is None and not self.deterministic and self._cache.max_bytes > 0
        if not keeps and not request.keep_state:
            return None
        state = self._slots.take([sequence.slot])
        if keeps:
            self._cache.add(sequence.has_read(), state)
        return state.clone() if request.keep_state else None

    def _end(self, sequence: _Sequence, last: Delta) -> None:
        """The slot is free before the request hears of its end."""
        if self._running.pop(sequence.slot, None) is None:
            self._prompts.drop(sequence)
        else:
            self._slots.free([sequence.slot])
        heapq.heappush(self._free, sequence.slot)
        _call(sequence.ticket, last)


_CANCELLED = Delta(-1, finished="cancelled")


def _call(ticket: Ticket, delta: Delta) -> bool:
    """Hand a delta to its listener; False if it raised, which is that request's matter and nobody else's."""
    try:
        ticket.on_delta(delta)
    except Exception:
        _log.exception("a listener of the engine raised")
        return False
    return True
