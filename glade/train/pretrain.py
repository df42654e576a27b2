"""From text to a trained model: `train(config)`, and the verb `glade train`.

Next-token prediction as a task: the corpus (`glade.data`), a model with fresh or copied weights, its perplexity.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from glade.data.loader import Batches, heldout_batches
from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError
from glade.evals.perplexity import Perplexity, heldout_batch_tokens, perplexity
from glade.interop.load import find_device
from glade.train.config import TrainRun
from glade.train.examples import Row
from glade.train.loop import Pass
from glade.train.loss import next_token_loss, token_losses
from glade.train.optim import peak_learning_rate
from glade.train.passes import Passes
from glade.train.resume import open_run
from glade.train.run import Results, Run, precision_context, report
from glade.train.start import starting_model


def train(config: TrainRun) -> Results:
    """Train as `config` says, in its run folder; returns when the budget is used up or the run is told to stop.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is trained, with nothing written.
        NonFiniteLoss: the loss is not finite; the last good weights are saved.
    """
    return Run(Pretraining(config)).run()


def run(config: TrainRun) -> None:
    """The verb `glade train`: train, and say where everything is."""
    results = train(config)
    told = []
    if results.heldout is not None:
        h = results.heldout.to_dict()
        told.append(
            f"held-out loss {h['loss']:.4f} nats a token (perplexity {h['perplexity']:.3f}, "
            f"{h['bits_per_byte']:.4f} bits a byte, word perplexity {h['word_perplexity']:.1f}, "
            f"next-token accuracy {100 * h['accuracy']:.1f} %)"
        )
    report(results, "train", told)


@dataclass
class NextTokens:
    """The objective of pretraining: the mean loss of the next token over the batches of a corpus."""

    read: Passes
    batches: Batches
    passes: int

    def forward(self, step: int, part: int) -> Pass:
        batch = self.batches.batch(step, rank=part, world=self.passes)
        row = Row(batch.ids, batch.targets, batch.cu_seqlens)
        if batch.dense:  # rows where all segments are of one length
            context = self.batches.context
            row = Row(batch.ids.view(-1, context), batch.targets.view(-1, context), None)
        losses, load_balance = self.read(token_losses, row)
        return Pass(next_token_loss(losses, self.batches.tokens_per_step), batch.num_targets, load_balance)

    def batch(self, step: int) -> dict[str, Tensor]:
        batch = self.batches.batch(step)
        return {"ids": batch.ids, "targets": batch.targets, "cu_seqlens": batch.cu_seqlens}


class Pretraining:
    """The task of `glade train`."""

    baseline = False

    def __init__(self, config: TrainRun) -> None:
        self.folder = open_run(config)
        self.device = find_device(config.device)
        self.prepared = config.data.prepare(config.seed)
        self.tokenizer = self.prepared.tokenizer
        model = replace(config.model, vocab_size=_vocab_size(config, self.tokenizer)).resolve()
        self.config = replace(config, run=str(self.folder), model=model)
        torch.manual_seed(config.seed)
        self.model, self.copied = starting_model(self.config, self.folder, self.tokenizer)
        self.model.to(self.device).train()
        self.steps, self.minutes = config.train.steps, config.train.minutes
        self.peak_lr = peak_learning_rate(config.train, model.dim)

    def objective(self, passes: Passes) -> NextTokens:
        train, data = self.config.train, self.config.data
        batches = Batches(
            self.prepared.mixture, context=data.context, batch_tokens=train.batch_tokens, seed=self.config.seed
        )
        return NextTokens(passes, batches, train.accumulate)

    def evaluate(self, *, whole: bool) -> Perplexity:
        train, context = self.config.train, self.config.data.context
        batch_tokens = heldout_batch_tokens(context, train.batch_tokens, self.model.config.vocab_rows)
        limit = None if whole else train.eval_tokens
        batches = heldout_batches(self.prepared.heldout, context=context, batch_tokens=batch_tokens, max_tokens=limit)
        return perplexity(self.model, batches, precision=precision_context(train.precision, self.device)())

    def rank(self, heldout: Perplexity) -> list[float]:
        return [heldout.loss]

    def row(self, heldout: Perplexity) -> dict[str, float | int]:
        measures = heldout.to_dict()
        names = ("loss", "perplexity", "bits_per_byte", "word_perplexity", "accuracy", "tokens")
        return {name: measures[name] for name in names}

    def told(self, heldout: Perplexity) -> str:
        h = heldout.to_dict()
        return (
            f"held-out loss {h['loss']:.4f}, perplexity {h['perplexity']:.3f}, "
            f"{h['bits_per_byte']:.4f} bits a byte, accuracy {100 * h['accuracy']:.1f} %"
        )

    def described(self) -> list[str]:
        d = self.prepared
        text = (
            f"text {self.config.data.corpus}: {d.train.num_tokens:,} tokens to train on, "
            f"{d.heldout.num_tokens:,} held out, vocabulary {self.tokenizer.vocab_size:,}"
        )
        return [text, self.copied] if self.copied else [text]

    def prompt(self) -> list[int]:
        """The first words of a held-out document, up to the end of a line."""
        ids = self.prepared.heldout.document(0)[1:65].tolist()
        text = self.tokenizer.decode([i for i in ids if i != self.tokenizer.eos_id])
        return self.tokenizer.prompt(text.split("\n", 1)[0][:64])

    def metadata(self) -> dict[str, Any]:
        return {
            "corpus": self.config.data.corpus,
            "credit": "\n".join(self.prepared.info["credits"]),
            "context": self.config.data.context,
        }

    def data(self) -> dict[str, Any]:
        return {
            "corpus": self.config.data.corpus,
            "tokenizer": self.config.data.tokenizer,
            "vocab_size": self.tokenizer.vocab_size,
            "train_tokens": self.prepared.train.num_tokens,
            "heldout_tokens": self.prepared.heldout.num_tokens,
            "context": self.config.data.context,
        }


def _vocab_size(config: TrainRun, tokenizer: Tokenizer) -> int:
    wanted = config.model.vocab_size
    if wanted is not None and wanted < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {wanted}, the tokenizer has {tokenizer.vocab_size} ids; leave model.vocab_size out"
        )
    return wanted or tokenizer.vocab_size
