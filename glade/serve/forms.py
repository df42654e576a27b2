"""Answers as OpenAI writes them: completions and chats, whole and in chunks. Pure: pieces in, JSON-able dicts out."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from glade import __version__
from glade.infer.text import Finished, Piece, TextToken, TokenBytes
from glade.serve.answers import Answers

JsonObject = dict[str, Any]

# what OpenAI writes for "very unlikely"; JSON has no infinity
_LEAST_LOGPROB = -9999.0


class Form(Protocol):
    """How the choices of one kind of answer are written."""

    def opening(self, choice: int) -> JsonObject | None:
        """The choice of a chunk before the first piece, if the kind has one."""
        ...

    def chunk(self, choice: int, piece: Piece) -> JsonObject:
        """The choice of a chunk for one piece."""
        ...

    def whole(self, choice: int, text: str, tokens: Sequence[TextToken], finished: Finished) -> JsonObject:
        """The choice of a whole answer."""
        ...

    def envelope(self, choices: Sequence[JsonObject], *, streamed: bool) -> JsonObject:
        """The object around choices, its id the same each time."""
        ...


def usage(answers: Answers) -> JsonObject:
    """What an answer cost, in tokens."""
    return {
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": answers.completion_tokens,
        "total_tokens": answers.prompt_tokens + answers.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answers.cached_tokens},
    }


def token_text(token: bytes) -> str:
    """A token alone; bytes that are no characters by themselves are spelled out, so that tokens stay distinct."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finish_reason(finished: Finished | None) -> str | None:
    return "stop" if finished == "eos" else finished


class _Envelope:
    """The id, the time and the model's name that all chunks of an answer share."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str) -> None:
        self.id, self.created, self.model = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time()), model

    def envelope(self, choices: Sequence[JsonObject], *, streamed: bool) -> JsonObject:
        return {
            "id": self.id,
            "object": self.chunk_object if streamed else self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"glade-{__version__}",
            "choices": list(choices),
        }


class Echo:
    """A prompt to be repeated before its answer: its text and, if asked for, its tokens' log-probabilities.

    The first token of a text follows nothing, so it has no log-probability: None.
    """

    def __init__(self, text: str, tokens: Sequence[tuple[TextToken, bool]]) -> None:
        self.text, self.tokens = text, tokens


class CompletionForm(_Envelope):
    """The object `text_completion`.

    Args:
        logprobs: report the tokens' log-probabilities
        echoes:   the prompts to repeat, one for each prompt, or none; `num` answers belong to each
    """

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, tokens: TokenBytes, *, logprobs: bool, echoes: Sequence[Echo] = (), num: int = 1
    ) -> None:
        super().__init__(model)
        self._bytes, self._logprobs, self._echoes, self._num = tokens, logprobs, echoes, num

    def opening(self, choice: int) -> JsonObject | None:
        echo = self._echo(choice)
        return self._choice(choice, echo.text, self._listed(echo, (), 0), None) if echo else None

    def chunk(self, choice: int, piece: Piece) -> JsonObject:
        echo = self._echo(choice)
        listed = self._listed(None, piece.tokens, len(echo.text) if echo else 0)
        return self._choice(choice, piece.text, listed, piece.finished)

    def whole(self, choice: int, text: str, tokens: Sequence[TextToken], finished: Finished) -> JsonObject:
        echo = self._echo(choice)
        before = echo.text if echo else ""
        return self._choice(choice, before + text, self._listed(echo, tokens, len(before)), finished)

    def _echo(self, choice: int) -> Echo | None:
        return self._echoes[choice // self._num] if self._echoes else None

    def _choice(self, choice: int, text: str, logprobs: JsonObject | None, finished: Finished | None) -> JsonObject:
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": _finish_reason(finished)}

    def _listed(self, echo: Echo | None, tokens: Sequence[TextToken], offset: int) -> JsonObject | None:
        if not self._logprobs:
            return None
        known = [*(echo.tokens if echo else ()), *((t._replace(start=t.start + offset), True) for t in tokens)]
        return {
            "tokens": [token_text(self._bytes[token.id]) for token, _ in known],
            "token_logprobs": [max(token.logprob, _LEAST_LOGPROB) if scored else None for token, scored in known],
            "top_logprobs": [self._top(token) if scored else None for token, scored in known],
            "text_offset": [token.start for token, _ in known],
        }

    def _top(self, token: TextToken) -> dict[str, float]:
        # the token drawn is always among them, as OpenAI has it
        ranked = token.top if token.id in dict(token.top) else (*token.top, (token.id, token.logprob))
        return {token_text(self._bytes[id]): max(logprob, _LEAST_LOGPROB) for id, logprob in ranked}


class ChatForm(_Envelope):
    """The objects `chat.completion` and `chat.completion.chunk`."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokens: TokenBytes, *, logprobs: bool) -> None:
        super().__init__(model)
        self._bytes, self._logprobs = tokens, logprobs

    def opening(self, choice: int) -> JsonObject | None:
        return self._delta(choice, {"role": "assistant", "content": ""}, (), None)

    def chunk(self, choice: int, piece: Piece) -> JsonObject:
        return self._delta(choice, {"content": piece.text} if piece.text else {}, piece.tokens, piece.finished)

    def whole(self, choice: int, text: str, tokens: Sequence[TextToken], finished: Finished) -> JsonObject:
        message = {"role": "assistant", "content": text, "refusal": None}
        rest = {"logprobs": self._listed(tokens), "finish_reason": _finish_reason(finished)}
        return {"index": choice, "message": message, **rest}

    def _delta(
        self, choice: int, delta: JsonObject, tokens: Sequence[TextToken], finished: Finished | None
    ) -> JsonObject:
        rest = {"logprobs": self._listed(tokens), "finish_reason": _finish_reason(finished)}
        return {"index": choice, "delta": delta, **rest}

    def _listed(self, tokens: Sequence[TextToken]) -> JsonObject | None:
        if not self._logprobs:
            return None
        content = [
            self._token(t.id, t.logprob) | {"top_logprobs": [self._token(*other) for other in t.top]} for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> JsonObject:
        token = self._bytes[id]
        return {"token": token_text(token), "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(token)}
