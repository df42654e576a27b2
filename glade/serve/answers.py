"""The answers to one request: the engine's tokens, awaited, as pieces of text. Knows nothing of HTTP."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from glade.errors import GladeError
from glade.infer.config import SamplingParams
from glade.infer.engine import Delta, Request, Ticket
from glade.infer.text import AnswerText, Piece
from glade.serve.handover import handover_to
from glade.serve.served import Served


class Part(NamedTuple):
    """One more piece of the answer number `choice`."""

    choice: int
    piece: Piece


class EngineFailed(GladeError):
    """The engine could not go on with a request; what it said is the message."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to answer: `num` answers to each prompt of token ids, numbered prompt by prompt.

    `params.stop` ends an answer; answer i draws with seed + i, or with fresh seeds if there is none.
    """

    prompts: Sequence[tuple[int, ...]]
    params: SamplingParams
    num: int = 1
    ignore_eos: bool = False


class Answers:
    """A task that an engine is at work on. Iterate once for its parts, in the order they come; `cancel` at any time.

    Made in a running event loop: the engine's thread hands over to it.

    Args:
        seconds: how long it may take from now; None is as long as it takes
    Raises:
        Busy: the engine has no room for all of the task; nothing of it is then left there.
        ValueError: a prompt that the model cannot take.
    """

    def __init__(self, served: Served, task: Task, seconds: float | None = None) -> None:
        self.prompt_tokens = sum(map(len, task.prompts))
        self.cached_tokens = self.completion_tokens = 0
        self._task = task
        loop = asyncio.get_running_loop()
        self._handover = handover_to(loop)
        self._deadline = None if seconds is None else loop.time() + seconds
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._texts = {i: AnswerText(served.tokenizer, task.params.stop) for i in range(len(task.prompts) * task.num)}
        self._begun: set[int] = set()
        self._tickets: list[Ticket] = []
        self.cancelled = False
        first = secrets.randbits(62) if task.params.seed is None else task.params.seed
        stop_ids = frozenset[int]() if task.ignore_eos else frozenset([served.tokenizer.eos_id])
        try:
            for choice in self._texts:
                # the engine knows ids only: texts that end an answer are found here
                params = replace(task.params, stop=(), seed=(first + choice) % 2**63)
                request = Request(prompt=task.prompts[choice // task.num], params=params, stop_ids=stop_ids)
                self._tickets.append(served.engine.submit(request, partial(self._hand_over, choice)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give back what the engine still holds for this task; the parts then end."""
        self.cancelled = True
        for ticket in self._tickets:
            ticket.cancel()

    @property
    def done(self) -> bool:
        """Every answer has finished."""
        return not self._texts

    async def __aiter__(self) -> AsyncIterator[Part]:
        """The parts until every answer has finished.

        Raises:
            EngineFailed: the engine could not go on; the other answers of the task are cancelled too.
            TimeoutError: it took too long.
        """
        try:
            while self._texts:
                async with asyncio.timeout_at(self._deadline):
                    choice, delta = await self._deltas.get()
                if self.cancelled and delta.finished == "cancelled":
                    return
                if choice in self._texts:
                    yield Part(choice, self._read(choice, delta))
        finally:
            self.cancel()

    def _hand_over(self, choice: int, delta: Delta) -> None:
        """Called by the engine's thread."""
        self._handover.call(partial(self._deltas.put_nowait, (choice, delta)))

    def _read(self, choice: int, delta: Delta) -> Piece:
        if delta.finished in ("error", "cancelled"):
            raise EngineFailed(delta.error or "the request was cancelled: the server is shutting down")
        if choice not in self._begun:
            self._begun.add(choice)
            # a prompt is counted once, whatever number of answers it gets
            self.cached_tokens += delta.cached_tokens if choice % self._task.num == 0 else 0
        self.completion_tokens += 1
        ended = "eos" if delta.finished == "eos" else "length" if delta.finished == "length" else None
        piece = self._texts[choice].push(delta.token_id, delta.logprob, delta.top, ended=ended)
        if piece.finished:
            del self._texts[choice]
            if delta.finished is None:
                self._tickets[choice].cancel()
        return piece
