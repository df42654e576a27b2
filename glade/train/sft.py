"""Fine-tuning on answers: `sft(config)`, and the verb `glade sft`.

The loss is that of the answers alone (the tokens of prompts and templates have no target), its mean over the answers'
tokens of a step. Examples are packed in one row without padding; the state begins anew at each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from glade.data.instruction import Example, load_examples
from glade.train.align import Alignment, evaluating
from glade.train.align_config import SftRun
from glade.train.examples import Row, grouped, lay_out, samples, spaced
from glade.train.loop import Pass
from glade.train.loss import next_token_loss, token_losses
from glade.train.passes import Passes, sent
from glade.train.run import Results, Run, precision_context, report

LR_AT_128 = 1e-3
EVAL_TOKENS = 8192


@dataclass(frozen=True)
class AnswerLoss:
    """Of one model on some answers: `tokens` are scored tokens, `nats` their summed loss."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    def to_dict(self) -> dict[str, float | int]:
        perplexity = math.exp(self.loss) if self.loss < 700 else math.inf
        return {"loss": self.loss, "perplexity": perplexity, "tokens": self.tokens}


def sft(config: SftRun) -> Results:
    """Fine-tune as `config` says, in its run folder; errors as `glade.train.pretrain.train`."""
    return Run(FineTuning(config)).run()


def run(config: SftRun) -> None:
    """The verb `glade sft`."""
    results = sft(config)
    told = []
    if results.heldout is not None:
        h = results.heldout
        told.append(f"held-out loss {h.loss:.4f} nats a token of the answers ({h.tokens:,} tokens)")
    report(results, "sft", told)


def pack_examples(examples: Sequence[Example]) -> Row:
    """The examples end to end; targets are the tokens of answers."""
    ids, borders = lay_out([example.ids[:-1] for example in examples])
    following = [
        [id if scored else -1 for id, scored in zip(example.ids[1:], example.scored[1:], strict=True)]
        for example in examples
    ]
    return Row(ids, lay_out(following)[0], borders)


@dataclass
class Answers:
    """The objective of fine-tuning: the mean loss of the answers' tokens."""

    read: Passes
    examples: Sequence[Example]
    batch_size: int
    passes: int
    seed: int

    def forward(self, step: int, part: int) -> Pass:
        scored = sum(sum(example.scored) for example in self._batch(step))
        row = pack_examples(self._batch(step, part, self.passes))
        losses, load_balance = self.read(token_losses, row)
        return Pass(next_token_loss(losses, scored), row.ids.numel(), load_balance)

    def batch(self, step: int) -> dict[str, Tensor]:
        return pack_examples(self._batch(step))._asdict()

    def _batch(self, step: int, part: int = 0, parts: int = 1) -> list[Example]:
        chosen = samples(len(self.examples), self.batch_size, self.seed, step, part, parts)
        return [self.examples[i] for i in chosen]


class FineTuning(Alignment):
    """The task of `glade sft`."""

    def __init__(self, config: SftRun) -> None:
        super().__init__(config, load_examples)
        self.begin(LR_AT_128)

    @property
    def context(self) -> int:
        return max(len(example.ids) for example in self.examples.train + self.examples.heldout) - 1

    def objective(self, passes: Passes) -> Answers:
        s = self.settings
        return Answers(passes, self.examples.train, s.batch_size, s.accumulate, self.config.seed)

    def evaluate(self, *, whole: bool) -> AnswerLoss | None:
        limit = None if whole else self.settings.eval_examples
        chosen = [self.examples.heldout[i] for i in spaced(len(self.examples.heldout), limit)]
        if not chosen:
            return None
        precision = precision_context(self.settings.precision, self.device)
        nats, tokens = 0.0, 0
        with evaluating(self.model):
            for group in grouped([len(example.ids) for example in chosen], EVAL_TOKENS):
                ids, targets, borders = (sent(x, self.device) for x in pack_examples(chosen[group]) if x is not None)
                with precision():
                    losses, _ = self.model(ids, targets=targets, cu_seqlens=borders, return_state=False)
                nats += losses.double().sum().item()
                tokens += int((targets >= 0).sum())
        return AnswerLoss(nats, tokens)

    def rank(self, heldout: AnswerLoss) -> list[float]:
        return [heldout.loss]

    def row(self, heldout: AnswerLoss) -> dict[str, float | int]:
        return heldout.to_dict()

    def told(self, heldout: AnswerLoss) -> str:
        h = heldout.to_dict()
        return f"held-out loss {h['loss']:.4f}, perplexity {h['perplexity']:.3f}, of {h['tokens']:,} answer tokens"
