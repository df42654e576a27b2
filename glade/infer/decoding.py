"""Token ids into more token ids: a batch of sequences that grows by one token a step. Knows nothing of text."""

import math
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager

from glade.errors import CheckpointError
from glade.infer.config import SamplingParams
from glade.infer.limits import check_length, check_prompt
from glade.infer.prefill import PromptReader
from glade.infer.prefix_cache import PrefixCache
from glade.infer.slots import Slots
from glade.infer.transfer import Token
from glade.model.lm import LanguageModel
from glade.model.state import State

# a long prompt is read in pieces, so that memory does not grow with it
_PIECE_TOKENS = 4096


class Decoding:
    """Sequences in flight: each prompt is read once, then every `step` draws a token for every row still in the batch.

    Equal prompts are read once for all their rows. Rows leave the batch by `drop`; those that stay do not notice.
    Where requests come and go, use `Engine`: it runs the same loop.

    Args:
        prompts: token ids of each row, at least one each
        state:   what the rows have read before (`prompts` then continue it); it is left as it is
        vocab_size: the tokenizer's; ids from there on are never drawn. Default: all of the model's
    Raises:
        DataError: an empty prompt, or an id that the model does not have.
        ConfigError: more tokens than a model with learned positions has positions for.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        state: State | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.params = params
        self.rows = list(range(len(prompts)))
        self._slots = Slots(model, len(prompts), vocab_size=vocab_size)
        for prompt in prompts or [()]:
            check_prompt(prompt, self._slots.vocab_size)
        read_before = 0 if state is None else int(state.position.max())
        check_length(model, read_before + max(map(len, prompts)), params.max_new_tokens)
        self.unread = {row: prompt[-1] for row, prompt in enumerate(prompts)}
        self._read(model, prompts, state)

    def step(self) -> list[Token]:
        """Draw the next token of every row in the batch, in the order of the rows.

        Raises:
            CheckpointError: the model's logits are not finite.
        """
        tokens = self._slots.step()
        if any(math.isnan(token.logprob) for token in tokens):
            raise CheckpointError("the model's logits are not finite; the weights are damaged or overflow")
        self.unread = {token.row: token.id for token in tokens}
        return tokens

    def held(self) -> AbstractContextManager[None]:
        """Inside, the model's weights stay where they are (`glade.infer.step.Step.held`)."""
        return self._slots.held()

    def drop(self, rows: Sequence[int]) -> None:
        """Take finished rows out of the batch."""
        self._slots.free([row for row in self.rows if row in rows])
        self.rows = [row for row in self.rows if row not in rows]

    @property
    def state(self) -> State:
        """A copy of what the rows in the batch have read: all tokens but the last one drawn, `unread[row]`.

        Whoever carries the state on must feed that one first.
        """
        return self._slots.take(self.rows)

    def _read(self, model: LanguageModel, prompts: Sequence[Sequence[int]], state: State | None) -> None:
        first = secrets.randbits(62) if self.params.seed is None else self.params.seed
        reader = PromptReader[int](model, PrefixCache(0, ()), self._slots.growing, _PIECE_TOKENS, alone=False)
        for row, prompt in enumerate(prompts):
            reader.add(tuple(prompt[:-1]), None if state is None else state.select([row]), row)
        while len(reader):
            for done in reader.step():
                if done.error is not None:
                    raise done.error
                prompt = prompts[done.owner]
                seed = (first + done.owner) % 2**63
                self._slots.fill(done.owner, done.state, prompt[-1], self.params, seed, prompt)
