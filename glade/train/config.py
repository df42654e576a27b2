"""What a training run can be told. Imports no torch, so that `glade train --help` answers at once."""

from dataclasses import dataclass
from typing import Any, Literal

from glade import config as settings
from glade.config import setting
from glade.data.config import DataConfig
from glade.errors import ConfigError
from glade.model.config import ModelConfig

DEFAULT_MINUTES = 4.0


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What every kind of training has in its section `train`: limits, the optimiser, what is written along the way."""

    max_steps: int | None = setting(None, "optimiser steps in all")
    max_minutes: float | None = setting(None, "minutes of training")
    stop_after: int | None = setting(None, "save and stop at this step; the schedule does not notice")
    accumulate: int = setting(1, "forward passes that a step is split into; more need less memory")
    lr: float | None = setting(None, "peak learning rate")
    min_lr: float = setting(0.1, "learning rate at the end, as a share of the peak")
    warmup: float = setting(0.02, "share of the budget over which the learning rate rises")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = setting(
        "cosine", "shape after the warm-up; wsd stays at the peak and falls over the last `decay`"
    )
    decay: float = setting(0.2, "share of the budget in which wsd falls")
    weight_decay: float = setting(0.1, "AdamW's, on matrices; norms, biases, embeddings, A_log, dt_bias have none")
    beta1: float = setting(0.9, "AdamW's first-moment decay")
    beta2: float = setting(0.95, "AdamW's second-moment decay")
    eps: float = setting(1e-8, "AdamW's eps")
    clip: float = setting(1.0, "largest norm of the gradient; 0: not clipped")
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "of matrix products; weights stay fp32. auto: bf16 where the device has it, else fp32"
    )
    recompute: Literal["none", "op", "layer"] = setting(
        "none", "what the backward computes again instead of keeping: the recurrence's insides, or whole layers"
    )
    cuda_graphs: Literal["auto", "on", "off"] = setting(
        "auto", "record passes on a GPU and replay them, so that no kernel waits for Python; auto: where that can be"
    )
    compile: bool = setting(False, "torch.compile the model: faster steps, a minute or more before the first")
    eval_every: int = setting(250, "steps between evaluations on what is held out; 0: only at the end")
    save_every: int = setting(0, "steps between checkpoints; 0: with every evaluation")
    keep: int = setting(1, "newest checkpoints kept besides best and last")
    log_every: int = setting(10, "steps between rows of metrics.jsonl")
    prompt: str | None = setting(None, "start of the samples; none: a held-out one")
    sample_tokens: int = setting(200, "tokens of a sample, drawn at every evaluation; 0: no samples")
    wandb: str | None = setting(None, "Weights & Biases project to log to as well; needs glade[track]")
    tensorboard: bool = setting(False, "write TensorBoard events into the run folder as well; needs glade[track]")

    def __post_init__(self) -> None:
        self._check_positive("max_steps", "max_minutes", "stop_after", "accumulate", "lr", "log_every")
        for name in ("weight_decay", "clip", "eval_every", "save_every", "keep", "sample_tokens", "eps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it may not be negative")
        for name in ("min_lr", "warmup", "decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be between 0 and 1")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"train.{name} is {value}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(LoopSettings):
    """Section `train` of `glade train`.

    The budget is max_steps or max_tokens; the learning rate is a function of the share of it that is used. With
    neither, max_minutes is the budget, and the schedule follows the clock (such a run is not repeatable to the bit).
    """

    max_tokens: int | None = setting(None, "trained tokens in all, rounded up to whole steps")
    max_minutes: float | None = setting(
        None, f"minutes of training; beside max_steps or max_tokens only a limit; none of the three: {DEFAULT_MINUTES}"
    )
    batch_tokens: int = setting(2048, "tokens of one optimiser step")
    lr: float | None = setting(None, "peak learning rate; none: 0.004 at model.dim 128, falling as 1 / sqrt(dim)")
    eval_tokens: int | None = setting(40_000, "held-out tokens of an evaluation along the way; the last uses all")
    prompt: str | None = setting(None, "start of the samples; none: the start of a held-out document")
    init_from: str | None = setting(None, "checkpoint whose weights training starts from (the optimiser starts afresh)")
    init_parts: tuple[str, ...] = setting((), "only weights whose names start so, as in embed,final_norm; empty: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("max_tokens", "batch_tokens", "eval_tokens")
        if self.max_steps is not None and self.max_tokens is not None:
            raise ConfigError(
                f"train.max_steps is {self.max_steps} and train.max_tokens {self.max_tokens}; give one of them"
            )
        if self.batch_tokens % self.accumulate:
            raise ConfigError(
                f"train.batch_tokens {self.batch_tokens} is not a multiple of train.accumulate {self.accumulate}"
            )
        if self.init_parts and self.init_from is None:
            raise ConfigError("train.init_parts names weights to copy, but train.init_from names no checkpoint")

    @property
    def steps(self) -> int | None:
        """Optimiser steps of the budget; None when only the clock limits it."""
        if self.max_tokens is not None:
            return -(-self.max_tokens // self.batch_tokens)
        return self.max_steps

    @property
    def minutes(self) -> float | None:
        """The limit of the clock; None when there is none."""
        if self.max_minutes is None and self.steps is None:
            return DEFAULT_MINUTES
        return self.max_minutes


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """A whole pretraining run: what `glade train` and `glade.train` take, and what `config.yaml` holds."""

    run: str | None = setting(None, "run folder; none: the next free runs/MIXER-NNN, or MIXER-MIXER-NNN of a hybrid")
    resume: bool = setting(False, "continue the run (without --run: the newest in runs/) from its last checkpoint")
    seed: int = setting(0, "of the weights, the order of the samples and dropout")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: cuda if there is one, else cpu")
    model: ModelConfig = setting(default_factory=ModelConfig, help="the model")
    data: DataConfig = setting(default_factory=DataConfig, help="the text")
    train: TrainSettings = setting(default_factory=TrainSettings, help="the training")

    def __post_init__(self) -> None:
        window = self.data.context
        if (self.train.batch_tokens // self.train.accumulate) < window:
            raise ConfigError(
                f"a forward pass has train.batch_tokens / train.accumulate = "
                f"{self.train.batch_tokens // self.train.accumulate} tokens, fewer than data.context {window}; "
                "raise train.batch_tokens, or lower train.accumulate or data.context"
            )
        positions = self.model.learned_positions
        if 0 < positions < window:
            raise ConfigError(f"data.context is {window}, but model.learned_positions is {positions}; raise it")

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must have kept: what the weights and the order of the samples mean."""
        model = settings.to_dict(self.model.resolve())
        if self.model.vocab_size is None:  # the tokenizer's
            del model["vocab_size"]
        named = {f"model.{key}": value for key, value in model.items()}
        return named | {"data.tokenizer": self.data.tokenizer, "seed": self.seed}

    @property
    def name(self) -> str:
        """What its run folder is called, before the number."""
        return "-".join(self.model.mixers)
