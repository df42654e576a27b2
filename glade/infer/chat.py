"""Talk to a model in the terminal: the verb `glade chat`. The state is carried from turn to turn, never rebuilt."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError, DataError
from glade.infer.config import ChatConfig, SamplingParams
from glade.infer.decoding import Decoding
from glade.infer.generate import decode_text, tokenizer_of
from glade.interop.load import load
from glade.model.lm import LanguageModel
from glade.model.state import State

_HELP = "/reset forgets the conversation, /seed N repeats draws, /quit (or Ctrl-D) ends"


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
        self.messages: list[dict[str, Any]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.state: State | None = None
        self.unread: list[int] = []  # drawn, shown, and not read by the model yet

    def reply(self, text: str, show: Callable[[str], object] | None = None) -> str:
        """The answer to `text`, each piece of it handed to `show` as it comes.

        Raises:
            DataError: text that the tokenizer cannot encode; the conversation is then as it was before.
        """
        ids, state = self._turn(text)
        decoding = Decoding(self.model, [ids], self.params, state=state, vocab_size=self.tokenizer.vocab_size)
        answer = ""
        for event in decode_text(decoding, self.tokenizer):
            answer += event.text
            if show is not None:
                show(event.text)
        # an EOS that ends a reply is not part of the text; a template writes its own
        self.unread = [id for id in decoding.unread.values() if id != self.tokenizer.eos_id]
        self.state = decoding.state
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer

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
        except (ConfigError, DataError) as error:
            # a line that cannot be read costs that line, not the conversation
            print(f"glade chat: {error}", file=sys.stderr)


def _answer(chat: Chat, line: str) -> None:
    command, _, argument = line.partition(" ")
    if command == "/reset":
        chat.reset()
    elif command == "/seed":
        if not argument.strip().isdigit():
            raise DataError(f"/seed {argument}: give a whole number, as in /seed 7")
        chat.params = replace(chat.params, seed=int(argument))
    elif line.startswith("/"):
        raise DataError(f"{command} is no command; {_HELP}")
    elif line:
        chat.reply(line, lambda text: print(text, end="", flush=True))
        print()
