"""What is asked of the engine, and what it answers: requests, deltas, tickets. Knows nothing of models at work."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from glade.errors import GladeError
from glade.infer.config import SamplingParams
from glade.model.state import State

Ending = Literal["eos", "length", "cancelled", "error"]


class Busy(GladeError):
    """As many requests wait as the engine lets wait; try again later."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    `params.stop` is for whoever makes text of the ids: they cancel the ticket once a stop text is there. Without
    `params.seed` the draws are not repeatable; rows of one prompt need different seeds to differ.
    """

    prompt: tuple[int, ...]  # at least one id
    params: SamplingParams
    state: State | None = None  # one row: `prompt` continues what it has read; it is left as it is
    stop_ids: frozenset[int] = field(default_factory=frozenset[int])  # ids that end the answer, usually the EOS
    keep_state: bool = False  # hand over the final state with the last delta


class Delta(NamedTuple):
    """One more token of an answer, or its end."""

    token_id: int  # -1 where an ending brings no token: "cancelled" and "error"
    logprob: float = 0.0  # nats, under the model before any sampling rule
    top: tuple[tuple[int, float], ...] = ()  # `params.logprobs` most likely ids with theirs, best first
    finished: Ending | None = None
    cached_tokens: int = 0  # of the prompt, on the first delta: those that did not have to be read
    state: State | None = None  # with `keep_state`, on the last: has read all tokens but the last one drawn
    error: str | None = None  # on a last delta that says "error"


class Ticket:
    """A request that was taken in."""

    def __init__(self, request: Request, on_delta: Callable[[Delta], None]) -> None:
        self.request, self.on_delta = request, on_delta
        self.cancelled = False

    def cancel(self) -> None:
        """Ends the request at the engine's next step; again, or after its end, it does nothing. From any thread."""
        self.cancelled = True


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What the engine holds now, and what it has done since it began."""

    slots: int  # sequences that can run at once
    running: int  # being decoded
    prefilling: int  # admitted, their prompts being read
    waiting: int
    steps: int
    prompt_tokens: int  # of the requests admitted
    cached_tokens: int  # of these, those that did not have to be read
    generated_tokens: int
    state_bytes: int  # of the table of states, whoever sits in it
    cache_bytes: int
    cached_prefixes: int
    decode: str  # what runs the decode step: captured (a GPU), native (a CPU), or torch, with the reason
