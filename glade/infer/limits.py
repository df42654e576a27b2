"""What a model can continue: ids it knows, in rows there are, no more tokens than it has positions and memory for."""

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from glade.errors import ConfigError, DataError
from glade.infer.rows import growing_bytes
from glade.model.lm import LanguageModel


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """DataError for an empty prompt or an id outside the vocabulary."""
    if not prompt:
        raise DataError("nothing to continue: every prompt needs at least one token, such as the BOS")
    if min(prompt) >= 0 and max(prompt) < vocab_size:
        return
    position, id = next((i, id) for i, id in enumerate(prompt) if not 0 <= id < vocab_size)
    raise DataError(
        f"token id {id} at position {position} of the prompt is unknown; "
        f"this model has {vocab_size} tokens, 0 to {vocab_size - 1}"
    )


def refuse_ids(ids: Tensor, vocab_size: int) -> NoReturn:
    """A decode step was given ids outside the vocabulary."""
    raise ValueError(
        f"ids holds {int(ids.min())} to {int(ids.max())}; the vocabulary has {vocab_size} entries, 0 to "
        f"{vocab_size - 1}. Was it made with this model's tokenizer?"
    )


def refuse_slots(slots: Sequence[int] | None, rows: int) -> NoReturn:
    """A decode step was given rows that the state does not have, or one of them twice."""
    raise ValueError(f"slots are {slots}; give distinct rows of the state, 0 to {rows - 1}")


def refuse_position(last: int, learned_positions: int) -> NoReturn:
    """A decode step would read a token beyond the learned positions."""
    raise ValueError(
        f"the sequence reaches position {last}; this model has {learned_positions} learned positions, so it reads no "
        "further. Shorten the text, or use a model with rotary or no positions"
    )


def check_length(model: LanguageModel, prompt_tokens: int, max_new_tokens: int, max_tokens: int | None = None) -> None:
    """ConfigError if a prompt of that many tokens (with what its state has read) and its answer are too long."""
    # the last token drawn is never read
    needed = prompt_tokens + max_new_tokens - 1
    for limit, what in (
        (model.config.learned_positions, "learned positions"),
        (max_tokens, "tokens of room for the keys and values of a sequence (max_state_bytes)"),
    ):
        if limit and needed > limit:
            room = limit - needed + max_new_tokens
            advice = f"set max_new_tokens to at most {room}" if room > 0 else "give a shorter prompt"
            raise ConfigError(
                f"this model has {limit} {what}, and the prompt with max_new_tokens={max_new_tokens} "
                f"needs {needed}; {advice}"
            )


def longest_sequence(model: LanguageModel, rows: int, max_state_bytes: int) -> int | None:
    """Tokens that each of `rows` sequences may have, so that growing layers stay within the bytes; None: any number."""
    per_token = growing_bytes(model) * rows
    if not per_token:
        return None
    if max_state_bytes < per_token:
        raise ConfigError(
            f"max_state_bytes is {max_state_bytes}; one token of {rows} sequences takes {per_token} bytes of keys and "
            "values: give more, or a smaller max_batch"
        )
    return max_state_bytes // per_token
