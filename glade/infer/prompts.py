"""Prompts for many samples: from a file of them, or the beginnings of documents, with what followed there."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glade.data.dialogue import Message, messages_in, prompt_ids
from glade.data.order import hashes
from glade.data.readers import Document, kind_of, lines
from glade.data.rows import BadRow, parse_rows, text_at
from glade.data.tokenizer import Tokenizer
from glade.errors import DataError

_REFERENCES = ("reference", "completion", "response", "chosen")
_WORD_END = re.compile(r"\S(?=\s|$)")


class Prompt(NamedTuple):
    """A text, or messages for the chat template, and the text that followed it, if any is known."""

    content: str | list[Message]
    reference: str | None = None

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """What the model reads."""
        if isinstance(self.content, str):
            return tokenizer.prompt(self.content)
        return prompt_ids(tokenizer, self.content)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in order, each once.

    A .jsonl or .json holds {"prompt": a text or messages} and may hold the text that should follow, as "reference",
    "completion", "response" or "chosen" (the first of these that is there). A .txt holds a prompt a line. Both may be
    compressed.

    Raises:
        DataError: an unknown suffix, a bad row (all are told, with their lines), or no prompt at all.
    """
    if kind_of(path) == ".txt":
        found = [Prompt(line.rstrip("\n")) for _, line in lines(path) if line.strip()]
    else:
        found = parse_rows(path, _parse, too_long="error", bad_rows="error")
    if not found:
        raise DataError(f"{path}: no prompt in it; give one a line")
    unique: dict[str, Prompt] = {}
    for prompt in found:
        unique.setdefault(repr(prompt.content), prompt)
    return list(unique.values())


def _parse(row: dict[str, Any]) -> Prompt:
    if isinstance(row.get("prompt"), list):
        content: str | list[Message] = messages_in(row["prompt"], "prompt")
    else:
        content = text_at(row, "prompt")
    key = next((key for key in _REFERENCES if key in row), None)
    if key is None:
        return Prompt(content)
    reference = row[key]
    if isinstance(reference, list):
        reference = messages_in(reference, key)[-1]["content"]
    elif not isinstance(reference, str):
        raise BadRow(f"{key!r} is neither a text nor a list of messages")
    return Prompt(content, reference)


def beginnings(documents: Iterable[Document], *, min_words: int, max_words: int, seed: int) -> Iterator[Prompt]:
    """The first words of each document, as many as the seed says between the two, and as reference all that follows.

    Documents that end there or before are passed over.
    """
    for number, document in enumerate(documents):
        count = min_words + int(hashes(1, seed, number)[0] % np.uint64(max_words - min_words + 1))
        prompt = _beginning(document, count)
        if prompt is not None:
            yield prompt


def _beginning(document: Document, num_words: int) -> Prompt | None:
    for number, end in enumerate(_WORD_END.finditer(document.text), 1):
        if number == num_words:
            rest = document.text[end.end() :]
            return Prompt(document.text[: end.end()], rest) if rest.strip() else None
    return None
