"""A task into a response: whole, or as server-sent events. Ends what its client no longer waits for."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from glade.infer.engine import Busy
from glade.infer.text import Finished, Piece, TextToken
from glade.serve.answers import Answers, EngineFailed, Part, Task
from glade.serve.config import ServeSettings
from glade.serve.forms import Form, JsonObject, usage
from glade.serve.metrics import Metrics
from glade.serve.refusal import Refusal
from glade.serve.served import Served

T = TypeVar("T")

# nginx's word for it; nobody reads it but the metrics
CLIENT_GONE = 499

_log = logging.getLogger(__name__)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Whole:
    """One choice as it fills up."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[TextToken] = []
        self.finished: Finished | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finished = piece.finished

    @property
    def mean_logprob(self) -> float:
        return sum(token.logprob for token in self.tokens) / max(len(self.tokens), 1)


class Responder:
    """Makes responses, within the server's time limit, and tells the metrics."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics

    async def whole(self, request: Request, served: Served, task: Task, form: Form, num: int, began: float) -> Response:
        """All of it at once: for each prompt the `num` likeliest a token of its answers."""
        answers = self._submit(served, task)
        choices = [Whole() for _ in range(len(task.prompts) * task.num)]

        async def collect() -> None:
            async for part in self._timed(served, answers, began):
                choices[part.choice].add(part.piece)

        try:
            await _unless_gone(request, collect())
        except TimeoutError as error:
            raise self._too_slow() from error
        except EngineFailed as error:
            raise Refusal(500, str(error), code="engine_error") from error
        except ClientGone:
            self._metrics.disconnected(served.name)
            return Response(status_code=CLIENT_GONE)
        finally:
            answers.cancel()
        chosen = _best(choices, len(task.prompts), num)
        listed = [form.whole(i, c.text, c.tokens, c.finished or "length") for i, c in enumerate(chosen)]
        return JSONResponse(form.envelope(listed, streamed=False) | {"usage": usage(answers)})

    def stream(self, served: Served, task: Task, form: Form, include_usage: bool, began: float) -> Response:
        """Piece by piece, as the engine draws."""
        answers = self._submit(served, task)
        events = self._events(served, answers, form, include_usage, began, len(task.prompts) * task.num)
        gone = partial(self._metrics.disconnected, served.name)
        return _EventStream(events, answers, gone, self._settings.max_seconds)

    def _submit(self, served: Served, task: Task) -> Answers:
        try:
            return Answers(served, task, self._settings.max_seconds)
        except Busy as error:
            raise Refusal(429, str(error), headers={"Retry-After": "1"}) from error

    def without_tokens(self, form: Form, task: Task, streamed: bool, include_usage: bool) -> Response:
        """The answer to a request for no tokens: prompts repeated and scored, where that is asked for."""
        num = len(task.prompts) * task.num
        prompt_tokens = sum(map(len, task.prompts))
        spent = {"prompt_tokens": prompt_tokens, "completion_tokens": 0, "total_tokens": prompt_tokens}
        if not streamed:
            choices = [form.whole(i, "", (), "length") for i in range(num)]
            return JSONResponse(form.envelope(choices, streamed=False) | {"usage": spent})
        parts = [choice for i in range(num) if (choice := form.opening(i))]
        parts += [form.chunk(i, Piece("", (), "length")) for i in range(num)]
        lines = [_event(form.envelope([part], streamed=True) | _null_usage(include_usage)) for part in parts]
        if include_usage:
            lines.append(_event(form.envelope([], streamed=True) | {"usage": spent}))
        return Response("".join([*lines, _DONE]), media_type="text/event-stream")

    async def _events(
        self, served: Served, answers: Answers, form: Form, include_usage: bool, began: float, num: int
    ) -> AsyncIterator[str]:
        """The lines of the stream; an error after its beginning is its last event."""
        no_usage = _null_usage(include_usage)
        try:
            for choice in range(num):
                if opening := form.opening(choice):
                    yield _event(form.envelope([opening], streamed=True) | no_usage)
            async for choice, piece in self._timed(served, answers, began):
                if piece.text or piece.tokens or piece.finished:
                    yield _event(form.envelope([form.chunk(choice, piece)], streamed=True) | no_usage)
        except TimeoutError:
            yield _event(self._too_slow().body())
        except EngineFailed as error:
            yield _event(Refusal(500, str(error), code="engine_error").body())
        else:
            if include_usage:
                yield _event(form.envelope([], streamed=True) | {"usage": usage(answers)})
            yield _DONE

    async def _timed(self, served: Served, answers: Answers, began: float) -> AsyncIterator[Part]:
        """The parts of the answers, their times told to the metrics."""
        last: dict[int, float] = {}
        async for part in answers:
            now = time.monotonic()
            if part.choice in last:
                self._metrics.next_token(served.name, now - last[part.choice])
            else:
                self._metrics.first_token(served.name, now - began)
            last[part.choice] = now
            yield part
        self._metrics.finished(served.name, time.monotonic() - began)

    def _too_slow(self) -> Refusal:
        return Refusal(504, f"the answer took longer than {self._settings.max_seconds:g} s, the most it may take here")


class _EventStream(StreamingResponse):
    """Server-sent events whose task ends with them, however they end.

    Args:
        on_gone: called when the client left before the end, or did not read what it was sent
        seconds: how long the answers may take; the events may take a little longer
    """

    def __init__(
        self, events: AsyncIterator[str], answers: Answers, on_gone: Callable[[], None], seconds: float
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers, self._on_gone, self._seconds = answers, on_gone, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # the answers keep their own time, and say so in the stream; this is for a client that does not read it
            async with asyncio.timeout(self._seconds + 5):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            _log.warning("a client did not read its stream; the connection is closed")
        finally:
            if not self._answers.done:
                self._on_gone()
            self._answers.cancel()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; ClientGone, and the work cancelled, if the client leaves before."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientGone
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


def _best(choices: Sequence[Whole], num_prompts: int, num: int) -> list[Whole]:
    """For each prompt the `num` answers with the highest log-probability a token; all of them in their order."""
    each = len(choices) // num_prompts
    chosen: list[Whole] = []
    for first in range(0, len(choices), each):
        group = list(choices[first : first + each])
        chosen += group if num == each else sorted(group, key=lambda c: c.mean_logprob, reverse=True)[:num]
    return chosen


def _event(content: JsonObject) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


_DONE = "data: [DONE]\n\n"


def _null_usage(include_usage: bool) -> JsonObject:
    """OpenAI's chunks carry a null where the last one carries the usage."""
    return {"usage": None} if include_usage else {}
