"""What `glade compare BASE ALIGNED --prompts=FILE` can be told. Imports no torch."""

from dataclasses import dataclass, fields
from pathlib import Path

from glade.config import setting
from glade.errors import ConfigError
from glade.infer.config import SamplingParams


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """A report on two models: `prompts` asks for it, and the other keys here need it."""

    prompts: Path | None = setting(
        None,
        "with this, the two runs (or checkpoints), BASE and ALIGNED, answer the prompts of a file, .jsonl with "
        "'prompt' or .txt with one a line, and report.html and report.json compare the answers",
    )
    names: tuple[str, ...] = setting((), "report: what the two models are called in it and in votes; none: their paths")
    num: int = setting(1, "report: answers of each model to each prompt")
    max_new_tokens: int = setting(128, "report: most tokens of an answer")
    temperature: float = setting(0.8, "report: divides the logits; 0 always takes the most likely token")
    top_k: int = setting(0, "report: keep only the k most likely tokens; 0 keeps all")
    top_p: float = setting(1.0, "report: keep the fewest most likely tokens whose probabilities reach p; 1 keeps all")
    seed: int = setting(0, "report: of the answers; both models draw with the same")
    scorer: str = setting(
        "repetition",
        "report: what decides who wins: repetition, logprob (under judge), module:function or file.py:function",
    )
    judge: str | None = setting(None, "report: the checkpoint that scorer=logprob asks")
    text: str | None = setting(None, "report: a corpus that neither model was trained on, for perplexity")
    text_field: str = setting("text", "report: field of a JSON line, or column of a table, that holds the text")
    text_chars: int = setting(200_000, "report: characters of that corpus to use, from its beginning")
    votes: Path | None = setting(None, "report: people's votes, .jsonl as the web page exports them")
    batch_size: int = setting(64, "report: answers drawn at a time")
    device: str = setting("auto", "report: cpu, cuda, cuda:1, mps; auto takes the accelerator if there is one")

    def __post_init__(self) -> None:
        if self.prompts is None:
            given = [f.name for f in fields(ReportConfig) if getattr(self, f.name) != f.default]
            if given:
                raise ConfigError(
                    f"without prompts, {', '.join(given)} cannot be honoured: give the report's --prompts=FILE too"
                )
        for key in ("num", "text_chars", "batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.names and len(set(self.names)) != 2:
            raise ConfigError(f"names is {', '.join(self.names)}; give two different ones, of BASE and of ALIGNED")
        self.sampling(0)

    def sampling(self, first: int) -> SamplingParams:
        """How answers number `first`, `first + 1`, ... are drawn."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed + first,
        )
