"""Token ids into more token ids: a batch of sequences that grows by one token a step. Knows nothing of text."""

import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor

from glade.errors import CheckpointError, ConfigError, DataError
from glade.infer.config import SamplingParams
from glade.infer.sampler import gumbel_noise, sample
from glade.model.lm import LanguageModel
from glade.model.state import State

# a long prompt is read in pieces, so that memory does not grow with it
_PIECE_TOKENS = 4096


class Token(NamedTuple):
    """One drawn token: `logprob` is its log-probability (nats) under the model, before any sampling rule."""

    row: int  # index of its prompt
    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely ids with their log-probabilities, best first


class Decoding:
    """Sequences in flight: each prompt is read once, then every `step` draws a token for every row still in the batch.

    `state` has seen all of a row's tokens but the last one drawn, `unread[row]`: whoever carries the state on must
    feed that one first. Rows leave the batch by `drop`; those that stay do not notice.

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
        self.model = model
        self.params = params
        self.rows = list(range(len(prompts)))
        self.unread: dict[int, int] = {}
        # a model may have more ids than its tokenizer; those have no text, so they are not drawn
        self.vocab_size = vocab_size or cast(int, model.config.vocab_size)
        self.device = next(model.parameters()).device
        self._check(prompts, state)
        first = secrets.randbits(62) if params.seed is None else params.seed
        self.seeds = torch.tensor([(first + row) % 2**63 for row in self.rows], device=self.device)
        self.seen = self._count(prompts) if params.repetition_penalty != 1 else None
        with _evaluating(model), torch.no_grad():
            self.logits, self.state = self._read(prompts, state)

    @torch.no_grad()
    def step(self) -> list[Token]:
        """Draw the next token of every row in the batch, in the order of the rows."""
        if self.unread:
            ids = torch.tensor([self.unread[row] for row in self.rows], device=self.device)
            with _evaluating(self.model):
                self.logits = self.model.step_(ids, self.state)
        p, logits = self.params, self.logits[:, : self.vocab_size].float()
        greedy = p.temperature == 0
        ids = sample(
            logits,
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            repetition_penalty=p.repetition_penalty,
            seen=self.seen,
            noise=None if greedy else gumbel_noise(self.seeds, self.state.position, logits.shape[-1]),
        )
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        tokens = self._report(logits.log_softmax(dim=-1), ids)
        self.unread = {token.row: token.id for token in tokens}
        return tokens

    def drop(self, rows: Sequence[int]) -> None:
        """Take finished rows out of the batch."""
        keep = [i for i, row in enumerate(self.rows) if row not in rows]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        index = torch.tensor(keep, dtype=torch.int64, device=self.device)
        self.state, self.seeds, self.logits = self.state.select(index), self.seeds[index], self.logits[index]
        self.seen = None if self.seen is None else self.seen[index]

    def _check(self, prompts: Sequence[Sequence[int]], state: State | None) -> None:
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise DataError("nothing to continue: every prompt needs at least one token, such as the BOS")
        for prompt in prompts:
            for position, id in enumerate(prompt):
                if not 0 <= id < self.vocab_size:
                    raise DataError(
                        f"token id {id} at position {position} of the prompt is unknown; "
                        f"this model has {self.vocab_size} tokens, 0 to {self.vocab_size - 1}"
                    )
        limit = self.model.config.learned_positions
        read = 0 if state is None else int(state.position.max())
        # the last token drawn is never read
        needed = read + max(map(len, prompts)) + self.params.max_new_tokens - 1
        if limit and needed > limit:
            room = limit - needed + self.params.max_new_tokens
            advice = f"set max_new_tokens to at most {room}" if room > 0 else "give a shorter prompt"
            raise ConfigError(
                f"this model has {limit} learned positions, and the prompt with max_new_tokens="
                f"{self.params.max_new_tokens} needs {needed}; {advice}"
            )

    def _read(self, prompts: Sequence[Sequence[int]], state: State | None) -> tuple[Tensor, State]:
        """Logits [B, vocab] after each prompt and the state there; prompts of different lengths are packed."""
        if len(prompts) > 1:
            ids = torch.tensor([[id for prompt in prompts for id in prompt]], device=self.device)
            lengths = torch.tensor([0, *map(len, prompts)], device=self.device)
            cu_seqlens = lengths.cumsum(0).to(torch.int32)
            return self.model(ids, state, cu_seqlens=cu_seqlens, logits="last")
        ids = torch.tensor([list(prompts[0])], device=self.device)
        logits = ids
        for piece in ids.split(_PIECE_TOKENS, dim=1):
            logits, state = self.model(piece, state, logits="last")
        assert state is not None
        return logits, state

    def _count(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        seen = torch.zeros(len(prompts), self.vocab_size, dtype=torch.bool, device=self.device)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(list(prompt), device=self.device)] = True
        return seen

    def _report(self, logprobs: Tensor, ids: Tensor) -> list[Token]:
        """The drawn ids as tokens on the host; the one place where a step waits for the device."""
        drawn = logprobs.gather(1, ids[:, None])[:, 0].tolist()
        best, best_ids = logprobs.topk(min(self.params.logprobs, logprobs.shape[-1]), dim=-1)
        alternatives = zip(best_ids.tolist(), best.tolist(), strict=True)
        tokens = []
        for row, id, logprob, (top_ids, top) in zip(self.rows, ids.tolist(), drawn, alternatives, strict=True):
            if math.isnan(logprob):
                raise CheckpointError("the model's logits are not finite; the weights are damaged or overflow")
            tokens.append(Token(row, id, logprob, tuple(zip(top_ids, top, strict=True))))
        return tokens


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """No dropout inside, the model's mode as it was outside: a trainer may ask for samples at any moment."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
