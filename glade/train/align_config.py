"""What `glade sft` and `glade dpo` can be told. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from typing import Any, Literal

from glade import config as settings
from glade.config import REQUIRED, setting
from glade.data.rows import RowsConfig
from glade.errors import ConfigError
from glade.train.config import LoopSettings

LossName = Literal["sigmoid", "ipo", "hinge", "sigmoid_norm", "simpo", "orpo"]

# the losses that compare the model with the one it started from
WITH_REFERENCE = ("sigmoid", "ipo", "hinge", "sigmoid_norm")
# as published; a loss on means per token needs more than one on sums over an answer
BETA: dict[str, float] = {"sigmoid": 0.1, "ipo": 0.1, "hinge": 0.1, "sigmoid_norm": 5.0, "simpo": 2.0, "orpo": 0.1}


@dataclass(frozen=True, kw_only=True)
class AlignSettings(LoopSettings):
    """Section `train` of `glade sft` and `glade dpo`: LoopSettings, in examples instead of tokens.

    The budget is max_steps, or else epochs. Examples are packed end to end, so that no length costs padding.
    """

    epochs: float = setting(1.0, "times through the training examples; max_steps, if given, counts instead")
    batch_size: int = setting(16, "examples (for dpo pairs) of one optimiser step")
    max_minutes: float | None = setting(None, "minutes of training, a limit beside the budget")
    min_lr: float = setting(0.0, "learning rate at the end, as a share of the peak")
    warmup: float = setting(0.1, "share of the budget over which the learning rate rises")
    weight_decay: float = setting(0.0, "AdamW's, on matrices; norms, biases, embeddings, A_log, dt_bias have none")
    eval_every: int = setting(20, "steps between evaluations on the held-out examples; 0: only at the end")
    eval_examples: int | None = setting(64, "held-out examples of an evaluation along the way; the last uses all")
    log_every: int = setting(1, "steps between rows of metrics.jsonl")
    prompt: str | None = setting(None, "start of the samples; none: a held-out prompt")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("epochs", "batch_size", "eval_examples")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"train.batch_size {self.batch_size} is not a multiple of train.accumulate {self.accumulate}"
            )

    def steps_for(self, num_examples: int) -> int:
        """Optimiser steps of the budget."""
        return self.max_steps or max(1, round(self.epochs * num_examples / self.batch_size))


@dataclass(frozen=True, kw_only=True)
class SftSettings(AlignSettings):
    """Section `train` of `glade sft`."""

    lr: float | None = setting(
        None, "peak learning rate; none: 0.001 at width 128, falling as 1 / width; with lora four times that"
    )


@dataclass(frozen=True, kw_only=True)
class DpoTrainSettings(AlignSettings):
    """Section `train` of `glade dpo`."""

    lr: float | None = setting(
        None, "peak learning rate; none: 0.00005 at width 128, falling as 1 / width; with lora four times that"
    )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Section `lora`: small trained matrices beside the frozen ones of every projection, merged when saved."""

    rank: int = setting(0, "of the adapters, A [rank, in] and B [out, rank]; 0: no adapters, all weights are trained")
    alpha: float | None = setting(None, "the adapters' output is multiplied by alpha / rank; none: twice the rank")
    dropout: float = setting(0.0, "probability, on the adapters' inputs")

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank is {self.rank}; it may not be negative")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must be at least 0 and less than 1")
        if not self.rank and (self.alpha is not None or self.dropout):
            raise ConfigError("lora.alpha and lora.dropout belong to adapters, but lora.rank is 0; give a rank, as 8")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"lora.alpha is {self.alpha}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class DpoSettings:
    """Section `dpo`: the loss. Formulas and sources are in `glade.train.preference_loss`."""

    loss: LossName = setting(
        "sigmoid",
        "sigmoid (DPO), ipo, hinge, sigmoid_norm (DPO by length), and without a reference model simpo and orpo",
    )
    beta: float | None = setting(
        None, f"how strongly the loss counts; none: {', '.join(f'{name} {beta}' for name, beta in BETA.items())}"
    )
    label_smoothing: float = setting(0.0, "sigmoid: the share of pairs that are the wrong way round")
    gamma: float | None = setting(None, "simpo: the margin of rewards to reach; none: half of beta")

    def __post_init__(self) -> None:
        if self.beta is not None and self.beta <= 0:
            raise ConfigError(f"dpo.beta is {self.beta}; it must be positive")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"dpo.label_smoothing is {self.label_smoothing}; it must be at least 0 and less than 0.5")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ConfigError(f"dpo.label_smoothing belongs to dpo.loss=sigmoid, not to {self.loss}; leave it out")
        if self.gamma is not None and self.loss != "simpo":
            raise ConfigError(f"dpo.gamma belongs to dpo.loss=simpo, not to {self.loss}; leave it out")

    @property
    def needs_reference(self) -> bool:
        return self.loss in WITH_REFERENCE

    def arguments(self) -> dict[str, float]:
        """What the loss function is called with, beside log-probabilities."""
        beta = BETA[self.loss] if self.beta is None else self.beta
        own = {
            "sigmoid": {"label_smoothing": self.label_smoothing},
            "simpo": {"gamma": beta / 2 if self.gamma is None else self.gamma},
        }
        return {"beta": beta, **own.get(self.loss, {})}


@dataclass(frozen=True, kw_only=True)
class AlignRun:
    """What a run of `glade sft` and one of `glade dpo` have in common."""

    run: str | None = setting(None, "run folder; none: the next free runs/VERB-NNN")
    resume: bool = setting(False, "continue the run (without --run: the newest in runs/) from its last checkpoint")
    seed: int = setting(0, "of the held-out split, the order of the examples and dropout")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: cuda if there is one, else cpu")
    model: str = setting(REQUIRED, "the model to start from: a run, a checkpoint folder, a hub name")
    data: RowsConfig = setting(REQUIRED, "the examples")
    lora: LoraSettings = setting(default_factory=LoraSettings, help="adapters")

    @property
    def name(self) -> str:
        """What its run folder is called, before the number."""
        raise NotImplementedError

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must have kept: what the weights and the order of the examples mean."""
        data = {f"data.{key}": value for key, value in settings.to_dict(self.data).items()}
        lora = {f"lora.{key}": value for key, value in settings.to_dict(self.lora).items()}
        return {"model": self.model, "seed": self.seed, **data, **lora}


@dataclass(frozen=True, kw_only=True)
class SftRun(AlignRun):
    """What `glade sft` takes, and what its `config.yaml` holds."""

    train: SftSettings = setting(default_factory=SftSettings, help="the training")

    @property
    def name(self) -> str:
        return "sft"


@dataclass(frozen=True, kw_only=True)
class DpoRun(AlignRun):
    """What `glade dpo` takes, and what its `config.yaml` holds."""

    train: DpoTrainSettings = setting(default_factory=DpoTrainSettings, help="the training")
    dpo: DpoSettings = setting(default_factory=DpoSettings, help="the loss")
    reference_cache: str | None = setting(
        None,
        "folder of the reference's log-probabilities; none for reference/ in $GLADE_CACHE, else in ~/.cache/glade",
    )

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | {f"dpo.{key}": value for key, value in settings.to_dict(self.dpo).items()}

    @property
    def name(self) -> str:
        return "dpo"
