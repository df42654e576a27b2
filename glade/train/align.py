"""What fine-tuning and preference training share: a trained model to start from, its examples, its adapters."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from glade.data.rows import RowsConfig, Split
from glade.data.tokenizer import Tokenizer
from glade.errors import CheckpointError, DataError
from glade.infer.generate import tokenizer_of
from glade.interop.load import find_device, load
from glade.model.checkpoint import load_weights, read_checkpoint, read_metadata
from glade.model.lm import LanguageModel
from glade.model.lora import add_lora
from glade.train.align_config import AlignRun, AlignSettings
from glade.train.resume import open_run

# adapters begin at zero beside weights that stay, and stand steps several times as long
LORA_LR_FACTOR = 4.0


class Alignment:
    """The part of a task that `glade sft` and `glade dpo` have in common: see `glade.train.run.Task`.

    After the constructor `model` is the one to start from, in evaluation mode; `begin` makes it the one to train.

    Raises:
        ConfigError, DataError, CheckpointError: what is named does not exist or does not fit together.
    """

    baseline = True

    def __init__(self, config: AlignRun, load_examples: Callable[[RowsConfig, Tokenizer, int], Split]) -> None:
        self.folder = open_run(config)
        self.config: Any = replace(config, run=str(self.folder))
        self.device = find_device(config.device)
        self.model = load(config.model, device=self.device, dtype="float32")
        self.tokenizer = tokenizer_of(self.model)
        self.examples = load_examples(config.data, self.tokenizer, config.seed)
        self.digest = weights_digest(self.model)
        self.settings: AlignSettings = self.config.train
        self.steps: int | None = self.settings.steps_for(len(self.examples.train))
        self.minutes = self.settings.max_minutes
        if config.resume:
            self._check_source(read_metadata(self.folder / "checkpoints" / "last"))

    def begin(self, lr_at_128: float) -> None:
        """Give the model its adapters, and on resuming its last weights; `lr_at_128` is the default at width 128."""
        lora, width = self.config.lora, self.model.config.dim
        torch.manual_seed(self.config.seed)
        self._check_context()
        last = self.folder / "checkpoints" / "last"
        if lora.rank:
            add_lora(self.model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout)
        elif self.config.resume:
            load_weights(self.model, read_checkpoint(last)[1], str(last))
        self.model.to(self.device).train()
        default = lr_at_128 * (128 / width) * (LORA_LR_FACTOR if lora.rank else 1)
        self.peak_lr = self.settings.lr or default

    def metadata(self) -> dict[str, Any]:
        return {
            "source": self.config.model,
            "source_digest": self.digest,
            "examples": str(self.config.data.file),
            "lora_rank": self.config.lora.rank,
        }

    def data(self) -> dict[str, Any]:
        return {
            "corpus": str(self.config.data.file),
            "tokenizer": self.config.model,
            "vocab_size": self.tokenizer.vocab_size,
            "train_examples": len(self.examples.train),
            "heldout_examples": len(self.examples.heldout),
            # measures of two runs can be compared where this is the same
            "heldout_digest": hashlib.sha256(repr(list(map(tuple, self.examples.heldout))).encode()).hexdigest(),
            "context": self.context,
        }

    def prompt(self) -> tuple[int, ...]:
        """The prompt of a held-out example."""
        examples = self.examples.heldout or self.examples.train
        return examples[0].prompt

    def described(self) -> list[str]:
        lora = self.config.lora
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        how = f"adapters of rank {lora.rank}, {trained:,} weights" if lora.rank else "all weights"
        return [
            f"from {self.config.model}, training {how}",
            f"examples {self.config.data.file}: {len(self.examples.train):,} to train on, "
            f"{len(self.examples.heldout):,} held out, {self.steps:,} steps of {self.settings.batch_size}",
        ]

    @property
    def context(self) -> int:
        """The longest example, in tokens."""
        raise NotImplementedError

    def _check_context(self) -> None:
        positions = self.model.config.learned_positions
        if positions and self.context > positions:
            raise DataError(
                f"the longest example is read up to its token {self.context}, but {self.config.model} has {positions} "
                f"learned positions; drop longer ones with --data.max_tokens={positions} --data.too_long=drop"
            )

    def _check_source(self, metadata: dict[str, Any]) -> None:
        if metadata.get("source_digest") != self.digest:
            raise CheckpointError(
                f"{self.config.model} is no longer the model that {self.folder} started from; put those weights back, "
                "or begin a new run"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and no gradients are kept."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def weights_digest(model: LanguageModel) -> str:
    """The sha256 of a model's config and weights: what decides what it computes."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(cast(Any, x.detach().cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()
