"""Completions of prompts under a model: their log-probabilities, and how far a second model is from it on them.

Sequences are packed end to end, the state beginning anew at each border, so that no length costs padding.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glade.infer.score import score_ids
from glade.infer.slots import evaluating
from glade.model.lm import LanguageModel

# what is read in one call; a longer sequence is read by itself, in pieces
_PACK_TOKENS = 8192
# numbers in the logits of one call, where they are needed whole
_LOGITS = 2**24


class Completion(NamedTuple):
    """Token ids of a prompt (BOS first, at least that) and of what is scored after it."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]


@torch.no_grad()
def logprobs(model: LanguageModel, completions: Sequence[Completion]) -> list[Tensor]:
    """log p of every id of each completion, given its prompt and the ids before it: fp32 [len(ids)], on the CPU.

    Raises:
        ConfigError: a sequence longer than a model with learned positions can number.
    """
    found: list[Tensor] = []
    with evaluating(model):
        for pack in _packs(completions, _PACK_TOKENS):
            if len(pack) == 1:
                scored = score_ids(model, [*pack[0].prompt, *pack[0].ids])[0]
                found.append(scored[len(pack[0].prompt) - 1 :].cpu())
                continue
            ids, targets, cu_seqlens = _packed(pack, model.embed.weight.device)
            losses, _ = model(ids, cu_seqlens=cu_seqlens, targets=targets, return_state=False)
            found += (-losses[targets >= 0]).cpu().split([len(c.ids) for c in pack])
    return found


@torch.no_grad()
def divergence(model: LanguageModel, base: LanguageModel, completions: Sequence[Completion]) -> list[Tensor]:
    """KL(model || base) of the next-token distributions before every id of each completion: fp32 [len(ids)], nats.

        KL_t = sum_v p_model(v | prefix_t) log(p_model(v | prefix_t) / p_base(v | prefix_t))

    The sum runs over the vocabulary, exactly; on the model's own samples, sum_t KL_t is an estimate of the divergence
    of whole answers with less noise than that of log-probabilities alone. Both models share one vocabulary.
    """
    device = model.embed.weight.device
    assert model.config.vocab_size == base.config.vocab_size, "a divergence needs one vocabulary"
    found: list[Tensor] = []
    with evaluating(model), evaluating(base):
        for pack in _packs(completions, max(1, _LOGITS // (model.config.vocab_size or 1))):
            ids, targets, cu_seqlens = _packed(pack, device)
            scored = targets[0] >= 0
            p, q = (
                m(ids, cu_seqlens=cu_seqlens, return_state=False)[0][0, scored].float().log_softmax(-1)
                for m in (model, base)
            )
            # a token that rounding leaves without probability contributes nothing, not 0 * inf
            terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)
            found += terms.sum(-1).cpu().split([len(c.ids) for c in pack])
    return found


def _packs(completions: Sequence[Completion], most: int) -> Iterator[list[Completion]]:
    """The completions in order, so many at a time that they have at most `most` tokens, and at least one."""
    pack: list[Completion] = []
    size = 0
    for completion in completions:
        length = len(completion.prompt) + len(completion.ids)
        if pack and size + length > most:
            yield pack
            pack, size = [], 0
        pack.append(completion)
        size += length
    if pack:
        yield pack


def _packed(pack: Sequence[Completion], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids [1, T] (each sequence without its last), targets [1, T] (-1 where nothing is scored), cu_seqlens [N + 1]."""
    ids, targets, borders = [], [], [0]
    for prompt, scored in pack:
        ids += [*prompt, *scored[:-1]]
        targets += [-1] * (len(prompt) - 1) + list(scored)
        borders.append(len(ids))
    return (
        torch.tensor([ids], device=device),
        torch.tensor([targets], device=device),
        torch.tensor(borders, dtype=torch.int32, device=device),
    )
