"""The text of one answer, token by token: whole characters, stop texts held back, each token with its log-probability.

Knows tokenizers, but neither models nor how a token is drawn: `generate`, `chat`, the server and its page share it.
"""

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

from glade.data.tokenizer import Tokenizer
from glade.data.vocabularies import byte_letters

Ended = Literal["eos", "length"]
Finished = Literal["stop", "eos", "length"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TextToken(NamedTuple):
    """A token of an answer, with the character of the answer at which its text begins."""

    id: int
    start: int
    logprob: float  # nats, under the model before any sampling rule
    top: tuple[tuple[int, float], ...]  # the most likely ids with theirs, best first


class Piece(NamedTuple):
    """What one more token makes certain.

    `text` is "" while a character is incomplete or could still become part of a stop text. `tokens` are those whose
    text is now shown: all of an answer's, but its EOS and those wholly behind a stop text's beginning.
    """

    text: str
    tokens: tuple[TextToken, ...]
    finished: Finished | None


class Stop:
    """Finds the first of several stop texts in text that arrives in pieces, and holds back what could become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop text ended it."""
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            return self.held[: min(found)], True
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        certain = self.held[: len(self.held) - keep]
        self.held = self.held[len(certain) :]
        return certain, False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        rest, self.held = self.held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next(size for size in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:size]))


class AnswerText:
    """One answer's way from ids to text: `push` takes each token as it is drawn and gives what is now certain."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.decoder()
        self._stop = Stop(stop)
        self._decoded = self._shown = 0  # characters
        self._waiting: deque[TextToken] = deque()

    def push(
        self,
        token_id: int,
        logprob: float = 0.0,
        top: tuple[tuple[int, float], ...] = (),
        *,
        ended: Ended | None = None,
    ) -> Piece:
        """The token `token_id`, and whether it is the last: the EOS, which is no text, or the last of the length."""
        text, stopped = "", False
        if ended != "eos":
            self._waiting.append(TextToken(token_id, self._decoded, logprob, top))
            text, stopped = self._advance(self._decoder.push(token_id))
        if ended and not stopped:
            # the decoder's last, incomplete character can still complete a stop text
            last, stopped = self._advance(self._decoder.flush())
            text += last if stopped else last + self._stop.flush()
        self._shown += len(text)
        return Piece(text, self._certain(stopped, ended), "stop" if stopped else ended)

    def _advance(self, decoded: str) -> tuple[str, bool]:
        self._decoded += len(decoded)
        return self._stop.push(decoded)

    def _certain(self, stopped: bool, ended: Ended | None) -> tuple[TextToken, ...]:
        tokens = []
        # a token goes out with its text's first character; without any text of its own, with what follows it
        while self._waiting and (self._waiting[0].start < self._shown or (ended and not stopped)):
            tokens.append(self._waiting.popleft())
        return tuple(tokens)


def plain_conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """What a model without a chat template reads of a conversation: all that was said, a line end before each turn of
    the user's but the first.
    """
    text = ""
    for message in messages:
        text += ("\n" if text and message["role"] == "user" else "") + message["content"]
    return text


class TokenBytes:
    """What each token of a tokenizer stands for, alone: bytes, of which several tokens may make one character.

    Unlike `Tokenizer.decode([id])`, a token keeps its leading space and its incomplete characters; a special token
    is its name.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of `token_id`; empty for an id that the vocabulary leaves out."""
        model = self._tokenizer.model
        if token_id in self._added:
            return self._added[token_id].encode()
        token = model.id_to_token(token_id)
        if token is None:
            return b""
        if self._letters is not None and all(letter in self._letters for letter in token):
            return bytes(self._letters[letter] for letter in token)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode() if self._spelled_spaces else token.encode()

    @cached_property
    def _added(self) -> dict[int, str]:
        return {id: token.content for id, token in self._tokenizer.model.get_added_tokens_decoder().items()}

    @cached_property
    def _decoders(self) -> list[str]:
        decoder = json.loads(self._tokenizer.model.to_str())["decoder"] or {"type": "none"}
        return [json.dumps(step) for step in decoder.get("decoders", [decoder])]

    @cached_property
    def _letters(self) -> dict[str, int] | None:
        """The byte of each letter of a byte-level vocabulary; None for another kind."""
        if not any('"ByteLevel"' in step for step in self._decoders):
            return None
        return {letter: byte for byte, letter in enumerate(byte_letters())}

    @cached_property
    def _spelled_spaces(self) -> bool:
        return any('"Metaspace"' in step or "\\u2581" in step for step in self._decoders)
