"""The probability a model gives to a text, token by token, and what it expects next; the verb `glade score`."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError, DataError
from glade.infer.config import ScoreConfig
from glade.infer.engine import check_length, check_prompt
from glade.infer.generate import read_input, tokenizer_of
from glade.infer.text import AnswerText, TextToken
from glade.interop.load import load
from glade.model.lm import LanguageModel

# a long text is scored in pieces, so that memory does not grow with it
_PIECE_TOKENS = 4096
# and in smaller ones where the logits of every token are wanted
_LOGITS_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Score:
    """log p(text) and its parts. The text follows the BOS; its end (the EOS) is not scored.

    total = sum_t log p(token_t | BOS, tokens before t), in nats
    """

    token_ids: list[int]
    texts: list[str]  # each token alone; an incomplete character shows as the replacement character
    logprobs: list[float]  # nats
    num_bytes: int  # UTF-8
    next_ids: list[int]  # the most likely tokens after the text, best first
    next_texts: list[str]
    next_probabilities: list[float]

    @property
    def total(self) -> float:
        """log p(text), in nats."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(-total / tokens)."""
        return math.exp(-self.total / len(self.logprobs))

    @property
    def bits_per_byte(self) -> float:
        """-total / ln 2 / bytes, which compares models of different vocabularies."""
        return -self.total / math.log(2) / self.num_bytes


def score(model: LanguageModel, tokenizer: Tokenizer, text: str, *, top: int = 10) -> Score:
    """Score `text` and list the `top` most likely tokens after it.

    Raises:
        DataError: an empty text, or one that the tokenizer cannot encode.
        ConfigError: more tokens than a model with learned positions has positions for.
    """
    ids = tokenizer.prompt(text)
    if len(ids) < 2:
        raise DataError("nothing to score: the text is empty; give at least one character")
    logprobs, logits = score_ids(model, ids)
    next_logprobs = logits[: tokenizer.vocab_size].float().log_softmax(dim=-1)
    best, best_ids = next_logprobs.topk(min(top, len(next_logprobs)))
    return Score(
        token_ids=ids[1:],
        texts=[tokenizer.decode([id]) for id in ids[1:]],
        logprobs=logprobs.tolist(),
        num_bytes=len(text.encode("utf-8")),
        next_ids=best_ids.tolist(),
        next_texts=[tokenizer.decode([id]) for id in best_ids.tolist()],
        next_probabilities=best.exp().tolist(),
    )


@torch.no_grad()
def score_ids(model: LanguageModel, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities fp32 [T - 1] of `ids` [T] after the first, and the logits [vocab] after the last.

    Raises:
        ConfigError: more ids than the model has learned positions.
    """
    limit = model.config.learned_positions
    if limit and len(ids) > limit:
        raise ConfigError(f"the text has {len(ids)} tokens with its BOS, the model {limit} learned positions")
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    state, losses = None, []
    for inputs, targets in zip(
        tokens[:, :-1].split(_PIECE_TOKENS, 1), tokens[:, 1:].split(_PIECE_TOKENS, 1), strict=True
    ):
        loss, state = model(inputs, state, targets=targets)
        losses.append(loss[0])
    logits, _ = model(tokens[:, -1:], state, logits="last")
    return -torch.cat(losses), logits[0]


@torch.no_grad()
def score_prompt(model: LanguageModel, tokenizer: Tokenizer, ids: Sequence[int], top: int = 0) -> list[TextToken]:
    """Every token of a prompt with its log-probability after those before it, and the `top` most likely ones there.

    The first follows nothing: its log-probability is 0, and nothing is listed beside it. Nowhere are more than a piece
    of the logits in memory.

    Raises:
        DataError: no ids, or one that the model does not have.
        ConfigError: more ids than the model has learned positions.
    """
    check_prompt(ids, tokenizer.vocab_size)
    check_length(model, len(ids), 0, None)
    text = AnswerText(tokenizer)
    scored = list(text.push(ids[0], ended="length" if len(ids) == 1 else None).tokens)
    tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
    state, at = None, 0
    for inputs, drawn in zip(
        tokens[:, :-1].split(_LOGITS_TOKENS, 1), tokens[:, 1:].split(_LOGITS_TOKENS, 1), strict=True
    ):
        logits, state = model(inputs, state)
        logprobs = logits[0, :, : tokenizer.vocab_size].float().log_softmax(dim=-1)
        best, best_ids = logprobs.topk(min(top, tokenizer.vocab_size), dim=-1)
        own = logprobs.gather(1, drawn[0, :, None])[:, 0].tolist()
        for id, logprob, *others in zip(drawn[0].tolist(), own, best_ids.tolist(), best.tolist(), strict=True):
            at += 1
            ended = "length" if at == len(ids) - 1 else None
            scored += text.push(id, logprob, tuple(zip(*others, strict=True)), ended=ended).tokens
    return scored


def run(config: ScoreConfig) -> None:
    """The verb `glade score`: print the score of a text as tables, or as one JSON object with --json."""
    text = read_input(config.text or "", config.file)
    model = load(config.checkpoint, device=config.device, dtype=config.dtype)
    result = score(model, tokenizer_of(model), text, top=config.top)
    if config.json:
        print(json.dumps(_as_json(result), ensure_ascii=False))
    else:
        _print_tables(result)


def _as_json(result: Score) -> dict[str, object]:
    tokens = zip(result.token_ids, result.texts, result.logprobs, strict=True)
    following = zip(result.next_ids, result.next_texts, result.next_probabilities, strict=True)
    return {
        "logprob": result.total,
        "num_tokens": len(result.token_ids),
        "num_bytes": result.num_bytes,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": [{"id": id, "text": text, "logprob": logprob} for id, text, logprob in tokens],
        "next": [{"id": id, "text": text, "probability": probability} for id, text, probability in following],
    }


def _print_tables(result: Score) -> None:
    tokens = zip(result.token_ids, result.texts, result.logprobs, strict=True)
    _print_table(
        ("token", "id", "log p (nats)", "p"),
        [(repr(text), str(id), f"{logprob:.4f}", f"{math.exp(logprob):.4f}") for id, text, logprob in tokens],
    )
    following = zip(result.next_ids, result.next_texts, result.next_probabilities, strict=True)
    _print_table(("next token", "id", "p"), [(repr(text), str(id), f"{p:.4f}") for id, text, p in following])
    print(
        f"log p = {result.total:.4f} nats over {len(result.token_ids)} tokens, {result.num_bytes} bytes; "
        f"perplexity {result.perplexity:.4f} a token, {result.bits_per_byte:.4f} bits per byte"
    )


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A drawn table on a terminal, tab-separated lines in a pipe."""
    if not sys.stdout.isatty():
        print(*("\t".join(row) for row in [header, *rows]), sep="\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header)
    for row in rows:
        # as Text, so that a token such as [/b] is not read as markup
        table.add_row(*map(Text, row))
    Console().print(table)
