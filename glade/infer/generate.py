"""Text into more text: `generate` gives it whole, `stream` as it comes; the verb `glade generate` prints it."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from glade.data.tokenizer import Tokenizer
from glade.errors import DataError
from glade.infer.config import GenerateConfig, SamplingParams
from glade.infer.decoding import Decoding
from glade.infer.text import AnswerText, Finished
from glade.interop.load import load
from glade.model.lm import LanguageModel


class Event(NamedTuple):
    """One drawn token of one row.

    `text` is what can be shown since the row's last event: "" while a character is incomplete or could still become
    part of a stop text. `finished` says why the row ends with this token: a stop text, the EOS, or max_new_tokens.
    """

    row: int
    token_id: int
    text: str
    logprob: float  # nats, under the model before any sampling rule
    top: tuple[tuple[int, float], ...]
    finished: Finished | None


def stream(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str | Sequence[str], params: SamplingParams
) -> Iterator[Event]:
    """Continue one or several prompts in one batch, and yield every token as it is drawn.

    A step yields one `Event` for each row still going, in the order of the rows; the `text`s of a row, joined, are its
    continuation. A row's tokens do not depend on the others. The state is constant-size where the layers' is: there
    is no longest text for a recurrent model.

    Raises:
        DataError: text that the tokenizer cannot encode.
        ConfigError: more tokens than a model with learned positions can number; raised before the first token.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    decoding = Decoding(model, [tokenizer.prompt(text) for text in prompts], params, vocab_size=tokenizer.vocab_size)
    yield from decode_text(decoding, tokenizer)


def decode_text(decoding: Decoding, tokenizer: Tokenizer) -> Iterator[Event]:
    """The events of a `Decoding` until every row has finished; it is left with the state and the unread tokens.

    The model's weights must stay where they are meanwhile.
    """
    rows = {row: AnswerText(tokenizer, decoding.params.stop) for row in decoding.rows}
    drawn = 0
    with decoding.held():
        while rows:
            drawn += 1
            at_length = "length" if drawn == decoding.params.max_new_tokens else None
            for token in decoding.step():
                ended = "eos" if token.id == tokenizer.eos_id else at_length
                text, _, finished = rows[token.row].push(token.id, ended=ended)
                if finished:
                    del rows[token.row]
                yield Event(token.row, token.id, text, token.logprob, token.top, finished)
            if rows:
                decoding.drop([row for row in decoding.rows if row not in rows])


def generate(
    model: LanguageModel,
    prompt: str | Sequence[str],
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> str | list[str]:
    """The continuation of `prompt`, without the prompt: a text for a text, a list for a list.

        glade.generate(model, "ROMEO:", max_new_tokens=100, temperature=0)

    Args:
        tokenizer: default `model.tokenizer`, which `glade.load` sets
        the others: see `glade.infer.config.SamplingParams`; row r of a list draws with seed + r
    Raises:
        DataError: no tokenizer, or text that it cannot encode.
        ConfigError: a sampling value out of its range, or more tokens than a model with learned positions has.
    """
    tokenizer = tokenizer or tokenizer_of(model)
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )
    texts = [""] * (1 if isinstance(prompt, str) else len(prompt))
    for event in stream(model, tokenizer, prompt, params):
        texts[event.row] += event.text
    return texts[0] if isinstance(prompt, str) else texts


def tokenizer_of(model: LanguageModel) -> Tokenizer:
    """The tokenizer that `glade.load` attached to `model`; a DataError for a model without one."""
    tokenizer = getattr(model, "tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise DataError("this model carries no tokenizer; pass tokenizer=..., or get the model from glade.load")
    return tokenizer


def generate_ids(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    eos_id: int | None = None,
) -> list[list[int]]:
    """The ids drawn after each prompt of ids, EOS included; for callers without text. `params.stop` must be empty."""
    if params.stop:
        raise DataError(f"stop texts {params.stop} need a tokenizer; use stream or generate")
    decoding = Decoding(model, prompts, params)
    drawn: list[list[int]] = [[] for _ in prompts]
    with decoding.held():
        for _ in range(params.max_new_tokens):
            tokens = decoding.step()
            for token in tokens:
                drawn[token.row].append(token.id)
            ended = [token.row for token in tokens if token.id == eos_id]
            if len(ended) == len(tokens):
                break
            decoding.drop(ended)
    return drawn


def run(config: GenerateConfig) -> None:
    """The verb `glade generate`: print the continuation of a prompt, or several, as they come."""
    # one line end at the end belongs to the editor or to the shell, not to the prompt
    prompt = read_input(config.prompt, config.prompt_file).removesuffix("\n")
    model = load(config.checkpoint, device=config.device, dtype=config.dtype)
    printer = _Printer(config, prompt)
    for event in stream(model, tokenizer_of(model), [prompt] * config.num, config):
        printer.push(event)


def read_input(text: str, file: Path | None) -> str:
    """The text of `file` if one is given, of standard input for "-", else `text`; nothing is added or stripped."""
    if file is None:
        return sys.stdin.read() if text == "-" else text
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from error


class _Printer:
    """Prints one sample as it comes, the next ones as soon as those before them are whole."""

    def __init__(self, config: GenerateConfig, prompt: str) -> None:
        self.num, self.stream = config.num, config.stream
        self.unprinted = [prompt if config.echo else ""] * config.num
        self.whole = [False] * config.num
        self.row = 0
        self._header()

    def push(self, event: Event) -> None:
        self.unprinted[event.row] += event.text
        self.whole[event.row] = event.finished is not None
        while self.row < self.num and (self.stream or self.whole[self.row]):
            print(self.unprinted[self.row], end="", flush=True)
            self.unprinted[self.row] = ""
            if not self.whole[self.row]:
                return
            print(flush=True)
            self.row += 1
            self._header()

    def _header(self) -> None:
        if self.num > 1 and self.row < self.num:
            print(f"--- sample {self.row + 1} of {self.num} ---", flush=True)
