"""What says which of two answers is better: a number for each, higher is better.

repetition          the answer's diversity (`glade.evals.repetition`), in [0, 1]
logprob             mean log-probability a token of the answer and its EOS under another checkpoint (the judge), nats
module:function     a Python function of the user's own, (prompt, answer) -> number; also file.py:function
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from glade.data.dialogue import Message
from glade.data.preference import answer_ids
from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError, DataError
from glade.evals.completions import Completion, logprobs
from glade.evals.repetition import diversity
from glade.infer.generate import tokenizer_of
from glade.interop.load import load
from glade.model.lm import LanguageModel

Prompt = str | list[Message]
Scorer = Callable[[Sequence[Prompt], Sequence[str]], list[float]]

BUILT_IN = ("repetition", "logprob")


def make_scorer(name: str, judge: str | None = None, device: str = "auto") -> Scorer:
    """The scorer that a setting names.

    Args:
        judge: the checkpoint that `logprob` asks, and that alone.
        device: where it runs.
    Raises:
        ConfigError: an unknown name, a judge that is missing or not asked, a function that cannot be found.
    """
    if (name == "logprob") != (judge is not None):
        raise ConfigError(
            "scorer=logprob needs judge=CHECKPOINT, the model whose log-probabilities rank the answers"
            if judge is None
            else f"judge={judge} belongs to scorer=logprob, not to {name}; leave it out"
        )
    if name == "repetition":
        return lambda prompts, answers: [diversity(answer) for answer in answers]
    if judge is not None:
        model = load(judge, device=device)
        return _Judge(model, tokenizer_of(model))
    return _UserFunction(name, _find(name))


class _Judge:
    """Mean log p a token of each answer with its EOS, under a model with a tokenizer of its own."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        completions = [
            Completion(*answer_ids(self.tokenizer, prompt, answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return [x.mean().item() for x in logprobs(self.model, completions)]


class _UserFunction:
    """A function of one prompt and one answer."""

    def __init__(self, name: str, function: Callable[[Prompt, str], float]) -> None:
        self.name, self.function = name, function

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        return [self._score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _score(self, prompt: Prompt, answer: str) -> float:
        value = self.function(prompt, answer)
        try:
            score = float(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"scorer {self.name} gave {value!r}; it must give a number, higher for better") from error
        if math.isnan(score):
            raise DataError(f"scorer {self.name} gave nan for the answer {answer[:60]!r}; it must give a number")
        return score


def _find(name: str) -> Callable[[Prompt, str], float]:
    """The function of `module:function` or `file.py:function`. It is the user's own program that is imported here."""
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise ConfigError(
            f"unknown scorer {name!r}; give {', '.join(BUILT_IN)} (`glade prefer` knows reference too), or your own as "
            f"module:function or file.py:function"
        )
    if source.endswith(".py"):
        path = Path(source)
        spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
        if spec is None or spec.loader is None:
            raise ConfigError(f"scorer {name!r}: there is no file {source}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise ConfigError(f"scorer {name!r}: {error}; a file is given as path/file.py:function") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"scorer {name!r}: {source} has no function {attribute!r}")
    return cast(Callable[[Prompt, str], float], function)
