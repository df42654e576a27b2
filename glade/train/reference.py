"""Log-probabilities of the model that preference training starts from: computed once, kept on disk by content.

The key of a file is what its numbers are a function of: the model's weights and config, the precision of its matrix
products, the token ids. So a resumed run, and any other run on the same pairs (another beta, another loss, another seed
of the split), reads them; nothing that changed is ever mistaken for them.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from glade.data.preference import Pair
from glade.data.progress import count_bar
from glade.errors import CheckpointError
from glade.model.atomic import write_file_atomically
from glade.model.lm import LanguageModel
from glade.train.examples import grouped
from glade.train.shared_prompt import PackedAnswers, pack, token_log_probs

# tokens that one forward pass of the reference reads
PASS_TOKENS = 8192


@dataclass(frozen=True)
class Reference:
    """log p of every token of every answer: those of pair i are the answers 2 i (chosen) and 2 i + 1 (rejected)."""

    log_probs: Tensor  # [tokens] fp32, nats
    borders: list[int]  # of the answers, end to end

    def of(self, pairs: Sequence[int]) -> Tensor:
        """The token log-probabilities of some pairs' answers, in their order."""
        return torch.cat([self.log_probs[self.borders[2 * i] : self.borders[2 * i + 2]] for i in pairs])


def default_cache() -> Path:
    return Path(os.environ.get("GLADE_CACHE") or "~/.cache/glade").expanduser() / "reference"


def reference(
    model: LanguageModel,
    digest: str,
    pairs: Sequence[Pair],
    *,
    cache: Path,
    precision_name: str,
    precision: Callable[[], AbstractContextManager],
) -> tuple[Reference, bool]:
    """The reference's log-probabilities, and whether they were in `cache` already.

    Args:
        model: in evaluation mode, without adapters (or with them off)
        digest: of its config and weights
        precision_name: of its matrix products, which are made inside `precision()`
    Raises:
        CheckpointError: a file in the cache is damaged.
    """
    path = cache / f"{_key(digest, precision_name, pairs)}.safetensors"
    lengths = [len(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    if path.is_file():
        return Reference(_read(path, borders[-1]), borders), True
    log_probs = _compute(model, pairs, precision)
    cache.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, to_safetensors({"log_probs": log_probs}))
    return Reference(log_probs, borders), False


def _key(digest: str, precision_name: str, pairs: Sequence[Pair]) -> str:
    key = hashlib.sha256(f"glade reference 1 {digest} {precision_name}".encode())
    for pair in pairs:
        key.update(repr(tuple(pair)).encode())
    return key.hexdigest()


def _read(path: Path, num_tokens: int) -> Tensor:
    try:
        log_probs = load_file(path)["log_probs"]
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it, and it is made again") from error
    if log_probs.shape != (num_tokens,):
        raise CheckpointError(f"{path} holds {list(log_probs.shape)} numbers, not [{num_tokens}]; remove it")
    return log_probs


@torch.no_grad()
def _compute(model: LanguageModel, pairs: Sequence[Pair], precision: Callable[[], AbstractContextManager]) -> Tensor:
    device = model.embed.weight.device
    parts = []
    with count_bar("reference log-probabilities", len(pairs)) as advance:
        for group in grouped([sum(map(len, pair)) for pair in pairs], PASS_TOKENS):
            batch = pack_pairs(pairs[group]).to(device)
            with precision():
                log_probs, _ = token_log_probs(model, batch)
            parts.append(log_probs.cpu())
            advance(len(pairs[group]))
    return torch.cat(parts)


def pack_pairs(pairs: Sequence[Pair]) -> PackedAnswers:
    """`pack` of both answers to every prompt: the answers 2 i and 2 i + 1 are those of pair i."""
    return pack(
        [pair.prompt for pair in pairs for _ in range(2)],
        [answer for pair in pairs for answer in (pair.chosen, pair.rejected)],
    )
