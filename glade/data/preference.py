"""Pairs of answers, one preferred to the other: the layouts of preference files, as token ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glade.data.dialogue import (
    Message,
    completion_ids,
    ends_with_answer,
    instruction_in,
    message_in,
    messages_in,
    messages_in_text,
    prompt_ids,
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


class Pair(NamedTuple):
    """Token ids: the prompt (BOS first), and two completions of it, each with its EOS at the end.

    A sequence is `prompt + chosen` or `prompt + rejected`; every id of a completion is scored, its first one included.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


class TextPair(NamedTuple):
    """A pair as text: plain (prompt a text), or a conversation (prompt the messages before the answer)."""

    prompt: str | list[Message]
    chosen: str
    rejected: str


def load_pairs(config: RowsConfig, tokenizer: Tokenizer, seed: int) -> Split:
    """The pairs of the config's files, split into `train` and `heldout`: lists of `Pair`.

    The tokenizer is given the config's chat template, which it will carry into the checkpoint, if there are
    conversations and not otherwise.

    Raises:
        DataError: rows that cannot be used (each with its line), where they are an error; none left; one prompt in both
            files.
    """
    return load_split(config, tokenizer, read_pairs, lambda pair: pair.prompt, seed)


def read_pairs(
    path: Path,
    tokenizer: Tokenizer,
    *,
    chat_template: str = "auto",
    separator: str = "",
    max_tokens: int | None = None,
    too_long: Policy = "error",
    bad_rows: Policy = "error",
) -> list[Pair]:
    """The pairs of one file, in its order.

    Layouts, each row for itself: {"prompt", "chosen", "rejected"} texts; UltraFeedback's lists of messages; HH-RLHF's
    "\\n\\nHuman: ...\\n\\nAssistant: ..."; ShareGPT's {"conversations", "chosen", "rejected"}; Alpaca's {"instruction",
    "input", "chosen", "rejected"}. All but the first are conversations, and go through the chat template.

    Args:
        chat_template: as `glade.data.templates.chat_template`; set on the tokenizer if there are conversations.
        separator: stands between a plain prompt and its completions, as the beginning of each completion.
        max_tokens: most tokens of a prompt and its longer completion.
        too_long, bad_rows: "error" tells all such rows at once; "drop" leaves them out and prints their count.
    Raises:
        DataError: as `load_pairs`.
    """

    def parse(row: dict[str, Any]) -> Pair:
        text = parse_pair(row)
        if not isinstance(text.prompt, str):
            use_template(tokenizer, chat_template)
        pair = tokenize_pair(text, tokenizer, separator)
        check_length(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)), max_tokens)
        return pair

    return parse_rows(path, parse, too_long=too_long, bad_rows=bad_rows)


def parse_pair(row: dict[str, Any]) -> TextPair:
    """One row of any layout of `read_pairs`.

    Raises:
        BadRow: missing keys, wrong types, an empty completion, equal completions, conversations that differ before
            their last turn, a vote that is a tie.
    """
    if row.get("tie"):
        raise BadRow("a tie, 'tie' is true: neither answer is preferred")
    pair = parse_sides(row)
    for key, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not text.strip():
            raise BadRow(f"{key!r} is empty")
    if pair.chosen == pair.rejected:
        raise BadRow("'chosen' and 'rejected' are the same")
    return pair


def parse_sides(row: dict[str, Any]) -> TextPair:
    """`parse_pair` without asking whether one of the answers can be preferred: they may be empty, equal, or a tie."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise BadRow(f"no {key!r}; its keys are {', '.join(map(repr, row)) or 'none'}")
    chosen, rejected = row["chosen"], row["rejected"]
    if "conversations" in row:
        return TextPair(
            messages_in(row["conversations"], "conversations"), _answer(row, "chosen"), _answer(row, "rejected")
        )
    if "instruction" in row:
        return TextPair(instruction_in(row), text_at(row, "chosen"), text_at(row, "rejected"))
    if isinstance(chosen, list) or isinstance(rejected, list):
        prompt = row.get("prompt")
        before = messages_in(prompt, "prompt") if isinstance(prompt, list) else []
        return _fork([_conversation(before, messages_in(row[key], key), key) for key in ("chosen", "rejected")])
    if "prompt" not in row:
        return _fork([messages_in_text(text_at(row, key), key) for key in ("chosen", "rejected")])
    prompt = messages_in(row["prompt"], "prompt") if isinstance(row["prompt"], list) else text_at(row, "prompt")
    return TextPair(prompt, text_at(row, "chosen"), text_at(row, "rejected"))


def _answer(row: dict[str, Any], key: str) -> str:
    """ShareGPT's answer: one message of the assistant's."""
    messages = [message_in(row[key], key)]
    ends_with_answer(messages, key)
    return messages[0]["content"]


def _conversation(before: list[Message], messages: list[Message], key: str) -> list[Message]:
    """A whole conversation: the messages as they are, or after the prompt if they begin with the answer to it."""
    if not before or messages[: len(before)] == before:
        return messages
    if len(messages) != 1:
        raise BadRow(f"{key!r} neither begins with the messages of 'prompt' nor is one answer to them")
    return before + messages


def _fork(conversations: Sequence[list[Message]]) -> TextPair:
    """Two conversations that are the same up to their last turn."""
    for key, messages in zip(("chosen", "rejected"), conversations, strict=True):
        ends_with_answer(messages, key)
    chosen, rejected = conversations
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("'chosen' and 'rejected' differ before the assistant's last turn, so they have no common prompt")
    if len(chosen) < 2:
        raise BadRow("'chosen' holds an answer and nothing that it answers")
    return TextPair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def tokenize_pair(pair: TextPair, tokenizer: Tokenizer, separator: str = "") -> Pair:
    """The ids of a pair; prompt and completions are tokenised apart, so that no merge crosses the border.

    Raises:
        BadRow: completions that differ only in what the template leaves out. DataError: a character that the tokenizer
            cannot spell, or no chat template for a conversation.
    """
    prompt, chosen = answer_ids(tokenizer, pair.prompt, pair.chosen, separator)
    rejected = _completion(tokenizer, pair.prompt, pair.rejected, separator)
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are the same tokens")
    return Pair(prompt, chosen, rejected)


def answer_ids(
    tokenizer: Tokenizer, prompt: str | list[Message], answer: str, separator: str = ""
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of a prompt and of one answer to it, with its EOS: of texts, or through the chat template.

    Raises:
        DataError: as `tokenize_pair`.
    """
    read = tokenizer.prompt(prompt) if isinstance(prompt, str) else prompt_ids(tokenizer, prompt)
    return tuple(read), _completion(tokenizer, prompt, answer, separator)


def _completion(tokenizer: Tokenizer, prompt: str | list[Message], answer: str, separator: str) -> tuple[int, ...]:
    if isinstance(prompt, str):
        # what follows nothing begins the document
        ids = tokenizer.continuation(separator + answer) if prompt else tokenizer.encode(answer)
        return *ids, tokenizer.eos_id
    return tuple(completion_ids(tokenizer, [*prompt, {"role": "assistant", "content": answer}]))
