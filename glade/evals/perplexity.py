"""How well a model predicts held-out text: sums over tokens first, one division at the end.

    loss            nats per token                       perplexity       exp(loss)
    bits_per_byte   nats / ln 2 / UTF-8 bytes            word_perplexity  exp(nats / whitespace-separated words)
    accuracy        share of tokens that are the model's first choice

No figure depends on how the text was cut into batches. Bits per byte and word perplexity can be compared between
tokenizers, since bytes and words are those of the original text.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from glade.data.loader import Batch
from glade.model.lm import LanguageModel

# a batch's logits [tokens, vocab] are whole in memory here (for the accuracy); batches are cut to stay below this
LOGITS_LIMIT = 2**23


@dataclass(frozen=True)
class Perplexity:
    """Of one model on one text. `tokens` are scored tokens, `nats` their summed loss."""

    nats: float
    tokens: int
    bytes: int
    words: int
    correct: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    def to_dict(self) -> dict[str, float | int]:
        """The measures by name, with the counts they come from."""
        return {
            "loss": self.loss,
            "perplexity": _exp(self.loss),
            "bits_per_byte": self.nats / math.log(2) / self.bytes if self.bytes else float("nan"),
            "word_perplexity": _exp(self.nats / self.words) if self.words else float("nan"),
            "accuracy": self.correct / self.tokens,
        } | asdict(self)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else float("inf")


@torch.no_grad()
def perplexity(
    model: LanguageModel, batches: Iterable[Batch], *, precision: AbstractContextManager | None = None
) -> Perplexity:
    """Score every target of `batches` (negative targets are padding).

    The model is put into eval mode and back. `precision` is entered around each forward pass.
    """
    device = model.embed.weight.device
    training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    tokens = num_bytes = words = 0
    for batch in batches:
        with precision or nullcontext():
            logits, _ = model(batch.ids.to(device), cu_seqlens=batch.cu_seqlens.to(device), return_state=False)
        losses, hits = _score(logits, batch.targets.to(device))
        nats += losses
        correct += hits
        tokens += batch.num_targets
        assert batch.num_bytes is not None and batch.num_words is not None, "held-out batches are measured"
        num_bytes += batch.num_bytes
        words += batch.num_words
    model.train(training)
    return Perplexity(nats.item(), tokens, num_bytes, words, int(correct.item()))


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss in fp64 nats and the number of first choices, over the targets that are not negative."""
    scored = targets >= 0
    logits, targets = (logits, targets) if bool(scored.all()) else (logits[scored], targets[scored])
    logits = logits.float()
    losses = logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]
    return losses.double().sum(), (logits.argmax(-1) == targets).sum()


def heldout_batch_tokens(context: int, batch_tokens: int, vocab_size: int) -> int:
    """Tokens of an evaluation batch: as many as a training batch, unless the logits would pass `LOGITS_LIMIT`."""
    return max(context, min(batch_tokens, LOGITS_LIMIT // vocab_size // context * context))
