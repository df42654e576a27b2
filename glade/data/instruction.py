"""Examples of answers to learn from: the layouts of instruction files, as token ids with the ones that are scored."""

from pathlib import Path
from typing import Any, NamedTuple

from glade.data.dialogue import (
    Message,
    Segment,
    ends_with_answer,
    instruction_in,
    messages_in,
    segments,
)
from glade.data.rows import (
    BadRow,
    Policy,
    RowsConfig,
    Split,
    check_length,
    load_split,
    parse_rows,
    text_at,
    use_template,
)
from glade.data.tokenizer import Tokenizer


class Example(NamedTuple):
    """Token ids (BOS first, EOS last), and for each whether the model learns to write it.

    Scored are the assistant's turns and the EOS that ends each: never the first id, never text of the template.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the first scored one."""
        return self.ids[: self.scored.index(True)]


class TextExample(NamedTuple):
    """An example as plain text; a conversation is a list of messages instead."""

    prompt: str
    completion: str


def load_examples(config: RowsConfig, tokenizer: Tokenizer, seed: int) -> Split:
    """The examples of the config's files, split by prompt into `train` and `heldout`: lists of `Example`.

    Tokenizer and errors as in `glade.data.preference.load_pairs`.
    """
    return load_split(config, tokenizer, read_examples, lambda example: example.prompt, seed)


def read_examples(
    path: Path,
    tokenizer: Tokenizer,
    *,
    chat_template: str = "auto",
    separator: str = "",
    max_tokens: int | None = None,
    too_long: Policy = "error",
    bad_rows: Policy = "error",
) -> list[Example]:
    """The examples of one file, in its order.

    Layouts, each row for itself: {"messages"}; ShareGPT's {"conversations"}; {"prompt", "completion" or "response"},
    texts, or messages; Alpaca's {"instruction", "input", "output"}; Dolly's {"instruction", "context", "response"}.
    All but texts with a prompt are conversations, and go through the chat template.

    Args and errors as in `glade.data.preference.read_pairs`.
    """

    def parse(row: dict[str, Any]) -> Example:
        text = parse_example(row)
        if not isinstance(text, TextExample):
            use_template(tokenizer, chat_template)
        example = tokenize_example(text, tokenizer, separator)
        check_length(len(example.ids), max_tokens)
        return example

    return parse_rows(path, parse, too_long=too_long, bad_rows=bad_rows)


def parse_example(row: dict[str, Any]) -> TextExample | list[Message]:
    """One row of any layout of `read_examples`.

    Raises:
        BadRow: missing keys, wrong types, an empty completion, a conversation that does not end with an answer.
    """
    text = _parse(row)
    if isinstance(text, TextExample):
        if not text.completion.strip():
            raise BadRow("the completion is empty")
        return text
    ends_with_answer(text, "conversations" if "conversations" in row else "messages" if "messages" in row else "answer")
    if len(text) < 2:
        raise BadRow("the conversation holds an answer and nothing that it answers")
    return text


def _parse(row: dict[str, Any]) -> TextExample | list[Message]:
    for key in ("messages", "conversations"):
        if key in row:
            return messages_in(row[key], key)
    if "instruction" in row:
        answer = text_at(row, "response" if "output" not in row and "response" in row else "output")
        return [*instruction_in(row), {"role": "assistant", "content": answer}]
    if "prompt" not in row:
        raise BadRow(
            f"no 'messages', 'conversations', 'prompt' or 'instruction'; its keys are "
            f"{', '.join(map(repr, row)) or 'none'}"
        )
    key = "response" if "completion" not in row and "response" in row else "completion"
    if not isinstance(row["prompt"], list):
        return TextExample(text_at(row, "prompt"), text_at(row, key))
    before = messages_in(row["prompt"], "prompt")
    if isinstance(row.get(key), list):
        return before + messages_in(row[key], key)
    return [*before, {"role": "assistant", "content": text_at(row, key)}]


def tokenize_example(example: TextExample | list[Message], tokenizer: Tokenizer, separator: str = "") -> Example:
    """The ids of an example, each piece tokenised apart, and which of them are scored.

    Raises:
        DataError: a character that the tokenizer cannot spell, or a chat template that is missing or unfit.
    """
    if isinstance(example, TextExample):
        encode = tokenizer.continuation if example.prompt else tokenizer.encode
        text = (separator if example.prompt else "") + example.completion
        pieces = [
            Segment(tokenizer.prompt(example.prompt), False),
            Segment([*encode(text), tokenizer.eos_id], True),
        ]
    else:
        pieces = segments(tokenizer, example)
    return Example(
        tuple(id for piece in pieces for id in piece.ids),
        tuple(piece.answer for piece in pieces for _ in piece.ids),
    )
