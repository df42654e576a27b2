"""Talk to a model in the terminal: the verb `glade chat`. The state is carried from turn to turn, never rebuilt."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from glade.data.tokenizer import Tokenizer
from glade.errors import CheckpointError, ConfigError, DataError
from glade.infer.config import ChatConfig, SamplingParams
from glade.infer.decoding import Decoding
from glade.infer.generate import decode_text, tokenizer_of
from glade.interop.load import load
from glade.model.lm import LanguageModel
from glade.model.state import State, read_state_file

_HELP = (
    "/undo takes the last turn back, /retry answers it again, /save FILE and /load FILE keep a conversation, "
    "/reset forgets it, /seed N repeats draws, /quit (or Ctrl-D) ends"
)
# turns that can be taken back; each keeps a state
MAX_UNDO = 32


class _Moment(NamedTuple):
    """A conversation between two turns. Nothing in it is written into, so it can be gone back to."""

    messages: list[dict[str, Any]]
    state: State | None
    unread: tuple[int, ...]  # drawn, shown, and not read by the model yet
    read: tuple[int, ...]  # what the state has read


class Chat:
    """A conversation with one model.

    With a chat template, turns are what the template makes of them. Without one the model continues plain text:
    what it reads is everything typed and answered so far, a line end before each turn but the first.

    Args:
        system: what the model is told before the first turn; needs a template
    Raises:
        ConfigError: `system` for a model without a chat template.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, params: SamplingParams, system: str | None = None
    ) -> None:
        if system is not None and tokenizer.chat_template is None:
            raise ConfigError("system needs a chat template, and this model's tokenizer has none; leave system out")
        self.model, self.tokenizer, self.params, self.system = model, tokenizer, params, system
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; the next turn is the first."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._now = _Moment(messages, None, (), ())
        self._before: list[tuple[_Moment, str]] = []

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far; the system's message, if there is one, first."""
        return self._now.messages

    @property
    def state(self) -> State | None:
        """What the model remembers: all tokens but those `unread`; None before the first turn."""
        return self._now.state

    @property
    def unread(self) -> list[int]:
        """Drawn, shown, and not read by the model yet."""
        return list(self._now.unread)

    def reply(self, text: str, show: Callable[[str], object] | None = None) -> str:
        """The answer to `text`, each piece of it handed to `show` as it comes.

        Raises:
            DataError: text that the tokenizer cannot encode; the conversation is then as it was before.
        """
        ids, state = self._turn(text)
        decoding = Decoding(self.model, [ids], self.params, state=state, vocab_size=self.tokenizer.vocab_size)
        answer, drawn = "", []
        for event in decode_text(decoding, self.tokenizer):
            answer += event.text
            drawn.append(event.token_id)
            if show is not None:
                show(event.text)
        # an EOS that ends a reply is not part of the text; a template writes its own
        unread = tuple(id for id in decoding.unread.values() if id != self.tokenizer.eos_id)
        read = (*(self._now.read if state is not None else ()), *ids, *drawn[:-1])
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self._before = [*self._before, (self._now, text)][-MAX_UNDO:]
        self._now = _Moment([*self.messages, *said], decoding.state, unread, read)
        return answer

    def undo(self) -> str:
        """Take the last turn back, as if it had not been; what was typed in it.

        Raises:
            DataError: there is no turn to take back.
        """
        if not self._before:
            raise DataError("there is no turn to take back")
        self._now, text = self._before.pop()
        return text

    def retry(self, show: Callable[[str], object] | None = None) -> str:
        """Another answer to the last turn: drawn with the next seed, where one is given.

        Raises:
            DataError: there is no turn to answer again.
        """
        text = self.undo()
        if self.params.seed is not None:
            self.params = replace(self.params, seed=(self.params.seed + 1) % 2**63)
        return self.reply(text, show)

    def save(self, path: str | Path) -> None:
        """Write the conversation to one file: what was said and what the model remembers of it.

        Raises:
            DataError: nothing has been said yet.
        """
        if self.state is None:
            raise DataError("nothing has been said yet, so there is nothing to save")
        notes = {"messages": json.dumps(self.messages), "unread": json.dumps(self.unread)}
        self.state.save(path, model=self.model, tokens=self._now.read, notes=notes)

    def load(self, path: str | Path) -> None:
        """Go on where a saved conversation with this model ended, whatever its dtype and device were.

        Raises:
            CheckpointError: the file is missing, damaged, of another model, or not a conversation; the present
                conversation then goes on.
        """
        state, tokens, notes = read_state_file(path, self.model)
        if tokens is None or not {"messages", "unread"} <= notes.keys():
            raise CheckpointError(f"{path} is a state, but not a conversation that /save wrote")
        self._now = _Moment(json.loads(notes["messages"]), state, tuple(json.loads(notes["unread"])), tuple(tokens))
        self._before = []

    def _turn(self, text: str) -> tuple[list[int], State | None]:
        """The ids to read for a new turn, and the state that they continue."""
        if self.tokenizer.chat_template is None:
            if self.state is None:
                return self.tokenizer.prompt(text), None
            return self.unread + self.tokenizer.encode("\n" + text), self.state
        whole = self.tokenizer.chat_ids([*self.messages, {"role": "user", "content": text}])
        if self.state is None:
            return whole, None
        # What comes after a reply is found by rendering an empty one in its place: the reply itself was read as it
        # was drawn, and its text could be cut into other tokens.
        *before, reply = self.messages
        read = self.tokenizer.chat_ids(before)
        blank = [*before, {**reply, "content": ""}, {"role": "user", "content": text}]
        rendered = self.tokenizer.chat_ids(blank)
        if rendered[: len(read)] != read:
            # a template that rewrites earlier turns: what the state holds is no longer what it wants to be read
            return whole, None
        return self.unread + rendered[len(read) :], self.state


def run(config: ChatConfig) -> None:
    """The verb `glade chat`: a loop over the lines typed, until /quit or the end of input."""
    model = load(config.checkpoint, device=config.device, dtype=config.dtype)
    chat = Chat(model, tokenizer_of(model), config, config.system)
    print(_HELP, file=sys.stderr)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            _answer(chat, line)
        except (CheckpointError, ConfigError, DataError, OSError) as error:
            # a line that cannot be read costs that line, not the conversation
            print(f"glade chat: {error}", file=sys.stderr)


def _answer(chat: Chat, line: str) -> None:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/reset":
        chat.reset()
    elif command == "/undo":
        print(f"taken back: {chat.undo()}", file=sys.stderr)
    elif command == "/retry":
        chat.retry(_show)
        print()
    elif command in ("/save", "/load"):
        if not argument:
            raise DataError(f"{command} needs a file, as in {command} talk.safetensors")
        (chat.save if command == "/save" else chat.load)(argument)
    elif command == "/seed":
        if not argument.isdigit():
            raise DataError(f"/seed {argument}: give a whole number, as in /seed 7")
        chat.params = replace(chat.params, seed=int(argument))
    elif line.startswith("/"):
        raise DataError(f"{command} is no command; {_HELP}")
    elif line:
        chat.reply(line, _show)
        print()


def _show(text: str) -> None:
    print(text, end="", flush=True)
