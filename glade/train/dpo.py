"""Preference training: `dpo(config)`, and the verb `glade dpo`.

    loss of a step = mean over its pairs of  loss(log p(chosen | prompt), log p(rejected | prompt))

Each prompt is read once for both answers (`glade.train.shared_prompt`), the losses are `glade.train.preference_loss`,
what the starting model gives the answers is computed before the first step (`glade.train.reference`). Dropout is off:
the model is compared with one that had none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from glade.data.preference import Pair, load_pairs
from glade.train.align import Alignment, evaluating
from glade.train.align_config import DpoRun
from glade.train.examples import grouped, samples, spaced
from glade.train.loop import Pass
from glade.train.passes import Direct, Passes, sent
from glade.train.preference_loss import LOSSES, Metrics, PairLogProbs
from glade.train.reference import PASS_TOKENS, Reference, default_cache, pack_pairs, reference
from glade.train.run import Results, Run, precision_context, report, uses_bf16
from glade.train.shared_prompt import answer_log_probs, sum_by_answer

LR_AT_128 = 5e-5


@dataclass(frozen=True)
class HeldoutPairs:
    """Means over held-out pairs: the loss, and the metrics of `glade.train.preference_loss`."""

    pairs: int
    measures: dict[str, float]

    @property
    def loss(self) -> float:
        return self.measures["loss"]

    def to_dict(self) -> dict[str, float | int]:
        return {**self.measures, "pairs": self.pairs}


def dpo(config: DpoRun) -> Results:
    """Train on preferences as `config` says, in its run folder; errors as `glade.train.pretrain.train`."""
    return Run(PreferenceTraining(config)).run()


def run(config: DpoRun) -> None:
    """The verb `glade dpo`."""
    results = dpo(config)
    told = []
    if results.heldout is not None:
        h = results.heldout.measures
        told.append(
            f"on {results.heldout.pairs:,} held-out pairs: the chosen answer is rated higher in "
            f"{100 * h['accuracy']:.1f} %, margin of rewards {h['margin']:.4f}, loss {h['loss']:.4f}"
        )
    report(results, "dpo", told)


class Judged(NamedTuple):
    """What some pairs came to."""

    loss: Tensor  # [B]
    metrics: Metrics  # [B] each
    num_tokens: int  # read
    load_balance: Tensor | None


@dataclass
class Preferences:
    """The objective of preference training, and its judge.

    What it logs beside the metrics of the loss: `kl`, an estimate of how far the model has moved from the reference,
    nats a token: the mean over an answer's tokens of (log pi - log ref)^2 / 2 ("k2" of J. Schulman, Approximating KL
    divergence, 2020: never negative, right to second order), averaged over both answers. The answers are the data's,
    not the model's own.
    """

    read: Passes
    pairs: Sequence[Pair]
    reference: Reference | None
    loss: Callable[..., tuple[Tensor, Metrics]]

    def judge(self, chosen: Sequence[int]) -> Judged:
        """Some of the pairs, by number."""
        batch = pack_pairs([self.pairs[i] for i in chosen])
        log_probs, load_balance = self.read(answer_log_probs, batch)
        log_probs = log_probs[: batch.ids.shape[1]]  # what follows is padding
        borders = sent(batch.borders, log_probs.device)
        policy = by_pair(log_probs, borders)
        if self.reference is None:
            return Judged(*self.loss(policy), batch.num_tokens, load_balance)
        before = sent(self.reference.of(chosen), log_probs.device)
        loss, metrics = self.loss(policy, by_pair(before, borders))
        moved = by_pair((log_probs.detach() - before).square() / 2, borders).mean()
        metrics["kl"] = (moved.chosen + moved.rejected) / 2
        return Judged(loss, metrics, batch.num_tokens, load_balance)


def by_pair(token_values: Tensor, borders: Tensor) -> PairLogProbs:
    """Sums over the answers 2 i and 2 i + 1 as pair i, with their lengths."""
    sums = sum_by_answer(token_values, borders).view(-1, 2)
    lengths = borders.diff().to(sums.dtype).view(-1, 2)
    return PairLogProbs(sums[:, 0], sums[:, 1], lengths[:, 0], lengths[:, 1])


@dataclass
class Steps:
    """`Preferences` as the loop takes them: which pairs a step is made of."""

    preferences: Preferences
    num_pairs: int
    batch_size: int
    passes: int
    seed: int

    def forward(self, step: int, part: int) -> Pass:
        judged = self.preferences.judge(self.chosen(step, part, self.passes))
        shares = {name: x.sum() / self.batch_size for name, x in judged.metrics.items()}
        return Pass(judged.loss.sum() / self.batch_size, judged.num_tokens, judged.load_balance, shares)

    def batch(self, step: int) -> dict[str, Tensor]:
        return pack_pairs([self.preferences.pairs[i] for i in self.chosen(step)])._asdict()

    def chosen(self, step: int, part: int = 0, parts: int = 1) -> list[int]:
        """The pairs of a step, or of one of its parts."""
        return samples(self.num_pairs, self.batch_size, self.seed, step, part, parts)


class PreferenceTraining(Alignment):
    """The task of `glade dpo`. Pairs are numbered through: those to train on, then those held out."""

    def __init__(self, config: DpoRun) -> None:
        super().__init__(config, load_pairs)
        self.pairs: list[Pair] = self.examples.train + self.examples.heldout
        self.precision = precision_context(self.settings.precision, self.device)
        self.reference, self.reused = self._reference() if config.dpo.needs_reference else (None, False)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.begin(LR_AT_128)

    def _reference(self) -> tuple[Reference, bool]:
        named = self.config.reference_cache
        return reference(
            self.model,
            self.digest,
            self.pairs,
            cache=default_cache() if named is None else Path(named),
            precision_name="bf16" if uses_bf16(self.settings.precision, self.device) else "fp32",
            precision=self.precision,
        )

    @property
    def context(self) -> int:
        pairs = self.examples.train + self.examples.heldout
        return max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs) - 1

    def preferences(self, passes: Passes) -> Preferences:
        settings = self.config.dpo
        loss = partial(LOSSES[settings.loss], **settings.arguments())
        return Preferences(passes, self.pairs, self.reference, loss)

    def objective(self, passes: Passes) -> Steps:
        s = self.settings
        num_pairs = len(self.examples.train)
        return Steps(self.preferences(passes), num_pairs, s.batch_size, s.accumulate, self.config.seed)

    def evaluate(self, *, whole: bool) -> HeldoutPairs | None:
        first = len(self.examples.train)
        chosen = [first + i for i in spaced(len(self.examples.heldout), None if whole else self.settings.eval_examples)]
        if not chosen:
            return None
        preferences = self.preferences(Direct(self.model, self.device))
        sums: dict[str, float] = {}
        with evaluating(self.model):
            for group in grouped([sum(map(len, self.pairs[i])) for i in chosen], PASS_TOKENS):
                with self.precision():
                    judged = preferences.judge(chosen[group])
                for name, x in {"loss": judged.loss, **judged.metrics}.items():
                    sums[name] = sums.get(name, 0.0) + x.double().sum().item()
        return HeldoutPairs(len(chosen), {name: value / len(chosen) for name, value in sums.items()})

    def rank(self, heldout: HeldoutPairs) -> list[float]:
        return [-heldout.measures["accuracy"], heldout.loss]

    def row(self, heldout: HeldoutPairs) -> dict[str, float | int]:
        return heldout.to_dict()

    def told(self, heldout: HeldoutPairs) -> str:
        h = heldout.measures
        return f"held-out accuracy {100 * h['accuracy']:.1f} %, margin {h['margin']:.4f}, loss {h['loss']:.4f}" + (
            f", kl {h['kl']:.4f} nats a token" if "kl" in h else ""
        )

    def described(self) -> list[str]:
        settings = self.config.dpo
        arguments = ", ".join(f"{name} {value:g}" for name, value in settings.arguments().items())
        known = "found in the cache" if self.reused else "computed, and kept"
        against = f", reference log-probabilities {known}" if settings.needs_reference else ", no reference model"
        return [*super().described(), f"loss {settings.loss} ({arguments}){against}"]
