"""Conversations: the layouts they come in as one list of messages, and such a list as token ids.

Text of the template and text of an answer are tokenised apart, so that no merge crosses the border between them.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from glade.data.rows import BadRow, text_at
from glade.data.tokenizer import Tokenizer

Message = dict[str, str]  # "role" and "content"

_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class Segment(NamedTuple):
    """Ids of one piece of a conversation; `answer`: the assistant's words and the EOS after them."""

    ids: list[int]
    answer: bool


def messages_in(value: Any, name: str) -> list[Message]:
    """A list of messages, {"role", "content"} or ShareGPT's {"from", "value"}, as the former.

    Args:
        name: what the list is called in errors.
    Raises:
        BadRow: not such a list, or an empty one.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name!r} is not a list of at least one message")
    return [message_in(item, f"{name}[{number}]") for number, item in enumerate(value)]


def message_in(value: Any, name: str) -> Message:
    """One message, of either layout of `messages_in`."""
    if not isinstance(value, dict):
        raise BadRow(f"{name!r} is not a message: an object with 'role' and 'content'")
    try:
        if "from" not in value:
            return {"role": text_at(value, "role"), "content": text_at(value, "content")}
        role, content = text_at(value, "from"), text_at(value, "value")
    except BadRow as error:
        raise BadRow(f"{name}: {error}") from error
    if role not in _SHAREGPT:
        raise BadRow(f"{name}: 'from' is {role!r}; known are {', '.join(_SHAREGPT)}")
    return {"role": _SHAREGPT[role], "content": content}


def messages_in_text(text: str, name: str) -> list[Message]:
    """The turns of HH-RLHF's layout, "\\n\\nHuman: ...\\n\\nAssistant: ...", without the space around each.

    Raises:
        BadRow: text before the first turn.
    """
    before, *turns = _HH_TURN.split(text)
    if before.strip() or not turns:
        raise BadRow(f"{name!r} does not begin with '\\n\\nHuman:'; give a 'prompt' beside it, or that layout")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": _HH_ROLES[who], "content": content.strip()} for who, content in pairs]


def instruction_in(row: dict[str, Any]) -> list[Message]:
    """Alpaca's "instruction" and "input", or Dolly's "instruction" and "context", as one message of the user."""
    parts = [text_at(row, key) for key in ("instruction", "input", "context") if key in row]
    if not parts[0].strip():
        raise BadRow("'instruction' is empty")
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]


def ends_with_answer(messages: Sequence[Message], name: str) -> None:
    """
    Raises:
        BadRow: the last message is not the assistant's, or it is empty.
    """
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"{name!r} ends with a turn of {messages[-1]['role']!r}; it must end with the assistant's")
    if not messages[-1]["content"].strip():
        raise BadRow(f"the assistant's last turn in {name!r} is empty")


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """What the model reads before it answers these messages: the same ids as in training on an answer to them."""
    *context, _ = segments(tokenizer, [*messages, {"role": "assistant", "content": ""}])
    return [id for segment in context for id in segment.ids]


def completion_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of the last message, an answer, with its EOS; errors as `segments`."""
    _check_contents(tokenizer, messages)
    answer = _answer(tokenizer, messages, tokenizer.chat(messages[:-1]))
    return [*tokenizer.continuation(answer), tokenizer.eos_id]


def segments(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Segment]:
    """A conversation that ends with an answer, in the pieces that its chat template makes of it.

    An answer is what the template writes between its generation prompt and the EOS (the content, as a rule): what the
    model will have to write. Text after the last EOS is left out.

    Raises:
        BadRow: a template under which an answer does not follow its generation prompt or does not end with the EOS, or
            that rewrites earlier turns. DataError: as `Tokenizer.chat_ids`.
    """
    _check_contents(tokenizer, messages)
    found: list[Segment] = []
    written = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening = tokenizer.chat(messages[:number])
        if not opening.startswith(written):
            raise BadRow(f"the chat template rewrites what stands before message {number}; take another template")
        answer = _answer(tokenizer, messages[: number + 1], opening)
        found.append(Segment(tokenizer.template_ids(opening[len(written) :], first=not written), False))
        found.append(Segment([*tokenizer.continuation(answer), tokenizer.eos_id], True))
        written = opening + answer + tokenizer.eos
    return found


def _answer(tokenizer: Tokenizer, messages: Sequence[Message], opening: str) -> str:
    """What the template writes of the last message, between `opening` and the EOS."""
    closed = tokenizer.chat(messages, add_generation_prompt=False)
    if not closed.startswith(opening):
        raise BadRow(
            f"under this chat template, the answer in message {len(messages) - 1} does not follow the generation "
            f"prompt; take another template"
        )
    answer, eos, _ = closed[len(opening) :].partition(tokenizer.eos)
    if not eos:
        raise BadRow(
            f"the chat template does not end the answer in message {len(messages) - 1} with the EOS {tokenizer.eos!r}, "
            f"on which generation stops; name what it writes as eos_token in tokenizer_config.json, or take another"
        )
    return answer


def _check_contents(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages):
        spelled = tokenizer.special_in(message["content"])
        if spelled is not None:
            raise BadRow(f"message {number} spells out the special token {spelled!r}; remove it")
