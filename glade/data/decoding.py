"""Text from ids that come one at a time. What an id means is the tokenizer's business, handed in as `decode`."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
# a UTF-8 character that is still incomplete lacks its last of at most four bytes
_MAX_INCOMPLETE = 3
# tokens of context that are tried before the window is left to grow
_MAX_CONTEXT = 8


class StreamDecoder:
    """Turns ids into text as they arrive: the pieces joined are the text of all ids.

    A token may be part of a character, or depend on the token before it (a leading space). So a short window of ids
    is decoded anew at each step and only what is new in it is handed out; the end of it waits while it may be an
    incomplete UTF-8 character. Bytes that never become one come out as U+FFFD.

    Args:
        decode: ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that were handed out
        self._waiting = 0  # ids since the text last ended in a whole character

    def push(self, token: int) -> str:
        """The text that this id adds; "" while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        held = len(text) - len(text.rstrip(_REPLACEMENT))
        if held == 0:
            new = text[self._emitted :]
            self._emitted, self._waiting = len(text), 0
            self._trim()
            return new
        self._waiting += 1
        if self._waiting <= _MAX_INCOMPLETE:
            return ""
        # four ids and still no whole character: some of these bytes never become one
        end = max(self._emitted, len(text) - min(held, _MAX_INCOMPLETE))
        new, self._emitted = text[self._emitted : end], end
        return new

    def flush(self) -> str:
        """What was held back; the decoder is then as new."""
        rest = self._decode(self._window)[self._emitted :]
        self._window, self._emitted, self._waiting = [], 0, 0
        return rest

    def _trim(self) -> None:
        """Keeps the fewest last ids that make whole characters by themselves, as context for the next one."""
        for size in range(1, min(_MAX_CONTEXT, len(self._window) - 1) + 1):
            text = self._decode(self._window[-size:])
            if text and _REPLACEMENT not in text:
                self._window, self._emitted = self._window[-size:], len(text)
                return
