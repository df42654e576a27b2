"""What `glade prefer` can be told. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glade.config import REQUIRED, setting
from glade.errors import ConfigError
from glade.infer.config import ModelSource, SamplingParams

Unfinished = Literal["cut", "keep", "drop"]


@dataclass(frozen=True, kw_only=True)
class PreferConfig(ModelSource):
    """`glade prefer`: preference pairs made from a model's own samples."""

    out: Path = setting(REQUIRED, "the .jsonl to write; beside it NAME.stats.json")
    prompts: Path | None = setting(
        None, "a file of prompts: .jsonl with 'prompt' (and 'reference'), or .txt, one a line"
    )
    corpus: str | None = setting(
        None, "a corpus whose documents' beginnings are the prompts, and what follows their references"
    )
    num_prompts: int = setting(500, "how many prompts to use, from the first on")
    min_words: int = setting(4, "fewest words of a document's beginning")
    max_words: int = setting(16, "most words of a document's beginning")
    text_field: str = setting("text", "field of a JSON line, or column of a table, that holds a document's text")
    scorer: str = setting(
        "reference",
        "reference (the reference is chosen, a sample rejected), or best against worst sample by: repetition, logprob "
        "(under judge), module:function or file.py:function, called with prompt and answer",
    )
    judge: str | None = setting(None, "the checkpoint that scorer=logprob asks: a run, a folder, a hub name")
    min_gap: float = setting(0.0, "a pair whose scores differ by no more than this is a tie, and left out")
    num: int = setting(4, "samples of each prompt")
    max_new_tokens: int = setting(128, "most tokens of a sample, and of a reference")
    temperature: float = setting(1.0, "divides the logits")
    top_k: int = setting(0, "keep only the k most likely tokens; 0 keeps all")
    top_p: float = setting(1.0, "keep the fewest most likely tokens whose probabilities reach p; 1 keeps all")
    unfinished: Unfinished = setting(
        "cut", "a sample without an end (and a reference that is too long): cut after its last sentence, keep, or drop"
    )
    batch_size: int = setting(64, "samples drawn at a time")
    seed: int = setting(0, "of the samples and of the beginnings' lengths")
    overwrite: bool = setting(False, "replace what is there, finished or interrupted")

    def __post_init__(self) -> None:
        if self.prompts is not None and self.corpus is not None:
            raise ConfigError(f"prompts ({self.prompts}) and corpus ({self.corpus}) are both given; give one of them")
        if self.out.suffix != ".jsonl":
            raise ConfigError(f"out is {self.out}; preference data are rows of JSON, give a name that ends in .jsonl")
        for key in ("num_prompts", "min_words", "num", "batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.max_words < self.min_words:
            raise ConfigError(f"max_words is {self.max_words}, below min_words={self.min_words}")
        if not self.min_gap >= 0:
            raise ConfigError(f"min_gap is {self.min_gap}; it must be 0 or above")
        if self.scorer != "reference" and self.num < 2:
            raise ConfigError(f"scorer={self.scorer} ranks the samples of a prompt; num={self.num} gives none to rank")
        if self.scorer == "reference" and self.min_gap:
            raise ConfigError("min_gap is a difference of scores, and scorer=reference has none; leave it out")
        if self.temperature == 0 and self.num > 1:
            raise ConfigError(f"temperature=0 draws {self.num} equal samples; give num=1, or a temperature above 0")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to 2**31 - 1")
        self.sampling(0)

    def sampling(self, first: int) -> SamplingParams:
        """How samples number `first`, `first + 1`, ... are drawn: each a function of the seed and its number alone."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=(self.seed << 31) + first,
        )
