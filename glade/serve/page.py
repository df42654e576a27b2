"""What the page does: answers in progress, next tokens, votes, curves. Knows no widget; `ui` draws them.

Everything here goes by way of the same engines as the API, within the same limits.
"""

import asyncio
import base64
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from glade.errors import ConfigError, DataError, GladeError
from glade.infer.config import SamplingParams
from glade.infer.score import score_prompt
from glade.infer.text import Finished, TextToken, plain_conversation
from glade.serve.answers import Answers, Task
from glade.serve.config import ServeSettings
from glade.serve.forms import token_text
from glade.serve.pictures import facts, meter
from glade.serve.served import Served
from glade.serve.votes import Ballot, Verdict, VoteBox, shuffled

# how often a person can follow a change
_REDRAW_SECONDS = 0.08
_TOP_TOKENS = 12
_LONGEST_SCORED = 2000
_LARGEST_PICTURE = 8 * 2**20

ChatMessage = dict[str, str]


@dataclass
class Draft:
    """One answer in progress: what can be shown of it now."""

    served: Served
    prompt: tuple[int, ...]
    params: SamplingParams
    text: str = ""
    num_tokens: int = 0  # of the answer
    cached_tokens: int = 0  # of the prompt
    finished: Finished | None = None
    failure: str | None = None
    first_s: float | None = None  # to the first token
    seconds: float = 0.0
    answers: Answers | None = field(default=None, repr=False)

    @property
    def seen_tokens(self) -> int:
        """Tokens that the state has been through."""
        return len(self.prompt) + self.num_tokens

    def meter(self) -> str:
        return meter(self.served.state_bytes, self.served.softmax_bytes, self.seen_tokens)

    def status(self) -> str:
        """One line about how far it is, and how to repeat it."""
        if self.failure is not None:
            return self.failure
        ended = {"stop": "ended at a stop text", "eos": "ended by the model", "length": "reached its length"}
        how = ended.get(self.finished or "", "writing" if self.answers and not self.answers.cancelled else "stopped")
        rate = self.num_tokens / self.seconds if self.seconds else 0.0
        cached = (
            f", {self.cached_tokens:,} of {len(self.prompt):,} prompt tokens known before" if self.cached_tokens else ""
        )
        return f"{how}: {self.num_tokens:,} tokens, {rate:,.0f} a second, seed {self.params.seed}{cached}"


class Page:
    """The models of a server as the page's visitors use them; visitors are told apart by a session's name."""

    def __init__(self, models: Mapping[str, Served], settings: ServeSettings) -> None:
        self.models, self.settings = models, settings
        self.votes = VoteBox(settings.votes)
        self._drafts: dict[str, list[Draft]] = {}
        self._scoring = asyncio.Lock()

    # ---- answers

    def draft(self, model: str, prompt: str | Sequence[ChatMessage], params: SamplingParams) -> Draft:
        """An answer to be drawn: to a text, or to the messages of a chat.

        Raises:
            GladeError: a prompt that the model cannot read, or more than the server allows.
        """
        served = self.models[model]
        ids = _prompt_ids(served, prompt)
        if len(ids) > self.settings.max_prompt_tokens:
            raise DataError(f"the prompt has {len(ids)} tokens; this server reads {self.settings.max_prompt_tokens}")
        if params.max_new_tokens > self.settings.max_new_tokens:
            raise ConfigError(f"this server writes at most {self.settings.max_new_tokens} tokens at once")
        return Draft(served, ids, params)

    async def follow(self, session: str, drafts: Sequence[Draft]) -> AsyncIterator[None]:
        """Draw the drafts side by side; yields whenever there is something new to show, and once at the end."""
        self.stop(session)
        self._drafts[session] = list(drafts)
        tasks: list[asyncio.Task[None]] = []
        try:
            for draft in drafts:
                task = Task(prompts=[draft.prompt], params=draft.params)
                draft.answers = Answers(draft.served, task, self.settings.max_seconds)
            tasks = [asyncio.create_task(_draw(draft)) for draft in drafts]
            pending = set(tasks)
            while pending:
                _, pending = await asyncio.wait(pending, timeout=_REDRAW_SECONDS)
                yield
        finally:
            # also when the visitor has left, or one of several drafts found no room
            for draft in drafts:
                if draft.answers is not None:
                    draft.answers.cancel()
            if self._drafts.get(session) == list(drafts):
                del self._drafts[session]
            await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self, session: str) -> None:
        """End what the session has in progress; what is there stays."""
        for draft in self._drafts.pop(session, ()):
            if draft.answers is not None:
                draft.answers.cancel()

    # ---- next tokens

    async def look(self, model: str, text: str) -> "Look":
        """The probabilities of every token of a text, and of what may come next.

        Raises:
            GladeError: a text that the model cannot read, or one too long to look at.
        """
        served = self.models[model]
        ids = served.tokenizer.prompt(text)
        if len(ids) > _LONGEST_SCORED:
            raise DataError(f"the text has {len(ids)} tokens; {_LONGEST_SCORED} can be looked at")
        async with self._scoring:
            # one more token, whichever: what is listed beside it is what may come next
            tokens = await asyncio.to_thread(
                score_prompt, served.model, served.tokenizer, [*ids, served.tokenizer.eos_id], _TOP_TOKENS
            )
        return Look(served, tokens[1:])

    # ---- votes

    def pair(self, first: str, second: str, prompt: str, params: SamplingParams, as_chat: bool) -> tuple[Draft, Draft]:
        """Two drafts for a blind vote, in an order that chance decides.

        Raises:
            GladeError: the two are the same model, or the prompt cannot be read.
        """
        if first == second:
            raise ConfigError("choose two different models; a vote between a model and itself says nothing")
        said = [{"role": "user", "content": prompt}] if as_chat else prompt
        left, right = shuffled(first, second)
        return self.draft(left, said, params), self.draft(right, said, params)

    def ballot(self, prompt: str, as_chat: bool, drafts: tuple[Draft, Draft]) -> Ballot:
        """What there is to vote on, once both drafts are done."""
        left, right = drafts
        params = left.params
        return Ballot(
            [{"role": "user", "content": prompt}] if as_chat else prompt,
            (left.text, right.text),
            (left.served.name, right.served.name),
            {
                "temperature": params.temperature,
                "top_k": params.top_k,
                "top_p": params.top_p,
                "min_p": params.min_p,
                "repetition_penalty": params.repetition_penalty,
                "max_new_tokens": params.max_new_tokens,
                "seed": params.seed,
            },
        )

    def vote(self, ballot: Ballot, verdict: Verdict) -> str:
        """Keep a vote, and say whose answers they were."""
        self.votes.add(ballot, verdict)
        left, right = ballot.models
        said = {"left": f"A, by {left}", "right": f"B, by {right}", "tie": "neither"}[verdict]
        return f"You preferred {said}. A was {left}, B was {right}."

    def tally(self, first: str, second: str) -> str:
        """The votes on two models, as a sentence."""
        wins, losses, ties = self.votes.tally(first, second)
        return f"{first}: {wins} · {second}: {losses} · ties: {ties} · in {self.votes.path}"

    # ---- what is known of a model

    def describe(self, model: str) -> str:
        served = self.models[model]
        config = served.model.config
        weight = served.model.embed.weight
        window = 1024
        return facts(
            [
                ("mixers", " ".join(config.mixers)),
                ("parameters", f"{served.num_parameters:,}"),
                ("layers x width", f"{config.num_layers} x {config.dim}"),
                ("vocabulary", f"{served.tokenizer.vocab_size:,}"),
                (f"state after {window:,} tokens", f"{served.state_bytes(window):,} bytes"),
                ("conversation", "chat template" if served.tokenizer.chat_template else "continues text"),
                ("runs on", f"{weight.device.type}, {str(weight.dtype).removeprefix('torch.')}"),
            ]
        )

    def curves(self, model: str) -> str:
        """The picture of the run that the model is of, inside the HTML, and its results."""
        run = self.models[model].run
        picture = None if run is None else run / "curves.png"
        if run is None or picture is None or not picture.is_file() or picture.stat().st_size > _LARGEST_PICTURE:
            return '<p class="note">This checkpoint lies in no run folder with curves.</p>'
        image = base64.b64encode(picture.read_bytes()).decode()
        return (
            f'{_results(run / "results.json")}<div class="curves">'
            f'<img alt="loss against tokens" src="data:image/png;base64,{image}"></div>'
        )


@dataclass(frozen=True)
class Look:
    """A text's tokens with their probabilities; the last entry stands for the place after the text."""

    served: Served
    tokens: Sequence[TextToken]

    @property
    def text_tokens(self) -> Sequence[TextToken]:
        return self.tokens[:-1]

    def ranked(self, place: int) -> list[tuple[str, float]]:
        """The most likely tokens at a place, from 0, with their probabilities."""
        return [(self.name(id), math.exp(logprob)) for id, logprob in self.tokens[place].top]

    def name(self, id: int) -> str:
        return token_text(self.served.token_bytes[id])

    def summary(self) -> str:
        nats = [-token.logprob for token in self.text_tokens]
        if not nats:
            return "what documents begin with"
        mean = math.fsum(nats) / len(nats)
        return f"{len(nats)} tokens, {mean:.3f} nats a token, perplexity {math.exp(min(mean, 700)):.2f}"


def sampling(
    temperature: float, top_k: float, top_p: float, min_p: float, penalty: float, length: float, seed: str, stops: str
) -> SamplingParams:
    """The settings of the page's controls. An empty seed draws one, so that what comes can be repeated.

    Raises:
        ConfigError: a value out of its range.
    """
    chosen = seed.strip()
    if chosen and not (chosen.isascii() and chosen.isdigit() and len(chosen) < 20):
        raise ConfigError(f"seed {chosen[:40]!r}: give a whole number, or nothing for a new one each time")
    return SamplingParams(
        max_new_tokens=int(length),
        temperature=float(temperature),
        top_k=int(top_k),
        top_p=float(top_p),
        min_p=float(min_p),
        repetition_penalty=float(penalty),
        seed=int(chosen) if chosen else secrets.randbits(31),
        # a line end can only be written as two characters in one line
        stop=tuple(stop.replace("\\n", "\n") for stop in stops.splitlines() if stop),
    )


def other_seed(params: SamplingParams) -> SamplingParams:
    """The same settings with the seed after; nothing that one draws is repeated by the other."""
    assert params.seed is not None
    return replace(params, seed=(params.seed + 1) % 2**63)


async def _draw(draft: Draft) -> None:
    assert draft.answers is not None
    began = time.monotonic()
    try:
        async for _, piece in draft.answers:
            draft.text += piece.text
            draft.num_tokens, draft.cached_tokens = draft.answers.completion_tokens, draft.answers.cached_tokens
            draft.seconds = time.monotonic() - began
            draft.first_s = draft.first_s or draft.seconds
            draft.finished = piece.finished
    except TimeoutError:
        draft.failure = "this took longer than the server allows"
    except GladeError as error:
        draft.failure = str(error)


def _prompt_ids(served: Served, prompt: str | Sequence[ChatMessage]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(served.tokenizer.prompt(prompt))
    if served.tokenizer.chat_template is None:
        return tuple(served.tokenizer.prompt(plain_conversation(prompt)))
    return tuple(served.tokenizer.chat_ids(list(prompt)))


def _results(file: Path) -> str:
    """The results of a run as facts; nothing where the run has not finished."""
    if not file.is_file():
        return ""
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    rows = [("tokens trained on", f"{results['tokens']:,}"), ("steps", f"{results['step']:,}")]
    if heldout := results["heldout"]:
        rows.append(("held-out loss", f"{heldout['loss']:.4f} nats"))
        # text has bits a byte, preference pairs have a margin, answers to learn from neither
        if "bits_per_byte" in heldout:
            rows.append(("bits a byte", f"{heldout['bits_per_byte']:.3f}"))
        if "accuracy" in heldout:
            right = "chosen rated above rejected" if "margin" in heldout else "next tokens right"
            rows.append((right, f"{100 * heldout['accuracy']:.1f} %"))
    return facts(rows)
