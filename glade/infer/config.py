"""What can be asked of sampling, and of the verbs `generate`, `chat` and `score`.

Imports no torch, so that `glade generate --help` and a mistyped key answer at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glade.config import REQUIRED, setting
from glade.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn, and when to stop; `glade.infer.sampler.sample` gives the exact order."""

    max_new_tokens: int = setting(200, "most tokens to add")
    temperature: float = setting(0.8, "divides the logits; 0 always takes the most likely token")
    top_k: int = setting(0, "keep only the k most likely tokens; 0 keeps all")
    top_p: float = setting(1.0, "keep the fewest most likely tokens whose probabilities reach p; 1 keeps all")
    min_p: float = setting(0.0, "keep tokens at least this many times as likely as the likeliest; 0 keeps all")
    repetition_penalty: float = setting(1.0, "weakens tokens that occurred, prompt included; 1 is off")
    seed: int | None = setting(None, "makes the draw repeatable (row r uses seed + r); none draws a fresh one")
    stop: tuple[str, ...] = setting((), 'texts that end the output and are not part of it, as in ["\\n\\n"]')
    logprobs: int = setting(0, "this many most likely tokens are reported with each token")

    def __post_init__(self) -> None:
        # written so that nan fails too
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        _check("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or above")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or above")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, and at most 1 (all tokens)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 (all tokens) to 1")
        positive = 0 < self.repetition_penalty < float("inf")
        _check("repetition_penalty", self.repetition_penalty, positive, "above 0; 1 is off, 1.1 is mild")
        seeded = self.seed is None or 0 <= self.seed < 2**63
        _check("seed", self.seed, seeded, "none, or from 0 to 2**63 - 1")
        _check("stop", self.stop, isinstance(self.stop, tuple) and all(self.stop), "a tuple of non-empty texts")
        _check("logprobs", self.logprobs, self.logprobs >= 0, "0 (off) or above")


def _check(key: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is {value!r}; it must be {allowed}")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which model, and where it runs; every verb that talks to one has these keys."""

    checkpoint: str = setting(REQUIRED, "a run folder, a checkpoint folder, or a Hugging Face name")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto takes the accelerator if there is one")
    dtype: Dtype | None = setting(None, "of the weights; int8 rounds the matrices; none keeps the checkpoint's")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingParams, ModelSource):
    """`glade generate`: continue a prompt."""

    prompt: str = setting("", "text to continue; - reads it from standard input")
    prompt_file: Path | None = setting(None, "file whose text is the prompt")
    num: int = setting(1, "samples of the prompt, made in one batch")
    echo: bool = setting(True, "print the prompt before its continuation")
    stream: bool = setting(True, "print the text as it comes; false prints it when it is whole")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("num", self.num, self.num >= 1, "at least 1")
        if self.prompt and self.prompt_file is not None:
            raise ConfigError(f"prompt and prompt_file ({self.prompt_file}) are both given; give one of them")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(SamplingParams, ModelSource):
    """`glade chat`: talk in the terminal; the state is carried from turn to turn."""

    system: str | None = setting(None, "what the model is told before the first turn (needs a chat template)")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ModelSource):
    """`glade score`: the probability of a text, and what would come next."""

    text: str | None = setting(None, "text to score; - reads it from standard input")
    file: Path | None = setting(None, "file whose text is scored")
    top: int = setting(10, "most likely next tokens to show")
    json: bool = setting(False, "print one JSON object instead of tables")

    def __post_init__(self) -> None:
        _check("top", self.top, self.top >= 0, "0 (none) or above")
        if (self.text is None) == (self.file is None):
            raise ConfigError("score needs a text: give --text=... or --file=..., one of them")
