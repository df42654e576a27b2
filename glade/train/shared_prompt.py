"""Answers to prompts, each prompt read once: its state is forked for every answer, and gradients flow back through it.

    read      all prompts of the batch, each but its last token, packed in one row      -> a state per prompt
    fork      state.select: the state of its prompt for every answer
    answer    last prompt token + answer (its last token left out), packed in one row, continuing those states

so a pair costs |prompt| + |chosen| + |rejected| tokens instead of 2 |prompt| + |chosen| + |rejected|, there is no
padding, and the first token of every answer is scored. It is the same function as running each prompt with each answer
whole, gradients of every parameter included, for every mixer, since a state is differentiable (checked in fp64 in
tests/train/test_shared_prompt.py). Equal prompts of a batch are read once in all.

Knows nothing of preferences: it answers log-probabilities.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from glade.model.state import State
from glade.ops.packing import rounded_up
from glade.train.examples import lay_out, padded_borders

Forward = Callable[..., tuple[Tensor, State]]
"""A `LanguageModel`, compiled or not."""


class PackedAnswers(NamedTuple):
    """A batch of A answers to P different prompts, in two rows of tokens."""

    prompt_ids: Tensor  # [1, tokens] the prompts, each without its last token
    prompt_borders: Tensor  # [P + 1] int32
    prompt_of: Tensor  # [A] the prompt that each answer continues
    ids: Tensor  # [1, T] for each answer the last token of its prompt, then all of its own but the last
    targets: Tensor  # [1, T] the answers
    borders: Tensor  # [A + 1] int32

    def to(self, device: torch.device) -> "PackedAnswers":
        return PackedAnswers(*(x.to(device) for x in self))

    @property
    def num_tokens(self) -> int:
        """What a forward pass reads."""
        return self.prompt_ids.numel() + self.ids.numel()

    def padded(self) -> Self:
        """For `glade.train.passes`: the last prompts are padding and empty, and so are the answers after the last."""
        prompt_extra, extra = (rounded_up(x.shape[1], 8) - x.shape[1] for x in (self.prompt_ids, self.ids))
        prompt_ids, ids = pad(self.prompt_ids, (0, prompt_extra)), pad(self.ids, (0, extra))
        borders = padded_borders(self.borders, ids.shape[1])
        return self._replace(
            prompt_ids=prompt_ids,
            prompt_borders=padded_borders(self.prompt_borders, prompt_ids.shape[1]),
            prompt_of=pad(self.prompt_of, (0, len(borders) - len(self.borders))),
            ids=ids,
            targets=pad(self.targets, (0, extra), value=-1),
            borders=borders,
        )

    def all_borders(self) -> Sequence[Tensor]:
        return self.prompt_borders, self.borders


def pack(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> PackedAnswers:
    """Lay `answers[i]`, the answer to `prompts[i]`, and the different ones of the prompts end to end.

    A prompt has at least one token (BOS) and an answer at least one (EOS); a prompt of one token is read as nothing.
    """
    assert len(prompts) == len(answers) and all(prompts) and all(answers)
    row: dict[tuple[int, ...], int] = {}
    prompt_of = [row.setdefault(tuple(prompt), len(row)) for prompt in prompts]
    inputs = [[prompt[-1], *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    return PackedAnswers(
        *lay_out([prompt[:-1] for prompt in row]),
        torch.tensor(prompt_of),
        lay_out(inputs)[0],
        *lay_out(answers),
    )


def token_log_probs(forward: Forward, packed: PackedAnswers) -> tuple[Tensor, Tensor | None]:
    """log p(token | prompt, answer so far) of every answer's tokens, [T] fp32 in nats, and the load-balancing loss of
    the tokens that were read (None without experts).
    """
    _, state = forward(packed.prompt_ids, cu_seqlens=packed.prompt_borders, logits="none")
    read = state.load_balance
    losses, after = forward(
        packed.ids,
        state.select(packed.prompt_of),
        cu_seqlens=packed.borders,
        targets=packed.targets,
        return_state=False,
    )
    answered = after.load_balance
    if answered is None or read is None:
        return -losses[0], answered
    share = packed.prompt_ids.numel() / packed.num_tokens
    return -losses[0], share * read + (1 - share) * answered


def answer_log_probs(model: Forward, *packed: Tensor) -> tuple[Tensor, Tensor | None]:
    """`token_log_probs` of the tensors of a `PackedAnswers`, for `glade.train.passes`."""
    return token_log_probs(model, PackedAnswers(*packed))


def sum_by_answer(x: Tensor, borders: Tensor) -> Tensor:
    """[A]: the sum of x [T] over the tokens of each answer."""
    return torch.segment_reduce(x, "sum", offsets=borders.to(torch.int64))
