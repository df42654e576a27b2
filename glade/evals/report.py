"""`glade compare BASE ALIGNED --prompts=FILE`: what alignment has changed, measured and side by side.

Both models answer the same prompts with the same random numbers. The report is a plain mapping, written as
report.json; `glade.evals.page` makes report.html of it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glade import config as settings
from glade.data.corpus import corpus
from glade.data.progress import count_bar
from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError, DataError
from glade.evals.completions import Completion, divergence, logprobs
from glade.evals.page import render_page
from glade.evals.repetition import distinct_n, diversity, rep_n, words
from glade.evals.report_config import ReportConfig
from glade.evals.scorers import Scorer, make_scorer
from glade.evals.votes import Tally, read_votes, tally
from glade.infer.generate import tokenizer_of
from glade.infer.prompts import Prompt, read_prompts
from glade.infer.samples import Sample, sample
from glade.interop.load import load
from glade.model.atomic import write_file_atomically
from glade.model.lm import LanguageModel

REP = (2, 3, 4)
DISTINCT = (1, 2, 3)


@dataclass(frozen=True)
class Subject:
    """One of the two models, and what it answered: `num` answers to each prompt, those of one prompt together."""

    name: str
    path: str
    model: LanguageModel
    tokenizer: Tokenizer
    answers: list[Sample]
    scores: list[float]

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]


def make_report(base: str, aligned: str, config: ReportConfig) -> dict[str, Any]:
    """The report on two models, each a run, a checkpoint folder or a hub name.

    Raises:
        ConfigError, DataError: a prompt file, votes, a scorer or a text that cannot be used; told before any sampling.
    """
    assert config.prompts is not None
    names = (config.names[0], config.names[1]) if config.names else _names(base, aligned)
    prompts = read_prompts(config.prompts)
    votes = None if config.votes is None else tally(read_votes(config.votes), *names)
    text = None if config.text is None else _read_text(config.text, config.text_field, config.text_chars)
    scorer = make_scorer(config.scorer, config.judge, config.device)
    with count_bar("answers", 2 * len(prompts) * config.num) as advance:
        first, second = (
            _answered(name, path, prompts, config, scorer, advance)
            for name, path in zip(names, (base, aligned), strict=True)
        )
    pair = first, second
    return {
        "models": [_described(subject) for subject in pair],
        "settings": {key: value for key, value in settings.to_dict(config).items() if key in _SAMPLING},
        "num_prompts": len(prompts),
        "measures": [_measures(subject) for subject in pair],
        "scorer": config.scorer if config.judge is None else f"{config.scorer} under {config.judge}",
        "scores": _contest(first, second).to_dict(),
        "kl": _kl(first, second, prompts, config.num),
        "heldout": None if text is None else [_heldout(subject, text) for subject in pair],
        "heldout_text": config.text,
        "votes": None if votes is None else votes.to_dict(),
        "answers": _side_by_side(first, second, prompts, config.num),
    }


_SAMPLING = ("prompts", "num", "max_new_tokens", "temperature", "top_k", "top_p", "seed")


def write_report(report: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """report.html and report.json in `folder`, each whole or as it was before."""
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "report.html", folder / "report.json"
    write_file_atomically(data, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    write_file_atomically(page, render_page(report).encode("utf-8"))
    return page, data


def _names(base: str, aligned: str) -> tuple[str, str]:
    """The folders' own names, or where these are alike the paths."""
    short = Path(base).name, Path(aligned).name
    names = (base, aligned) if short[0] == short[1] else short
    if names[0] == names[1]:
        raise ConfigError(f"BASE and ALIGNED are both {base}; give two models")
    return names


# --- what the models answer ---


def _answered(
    name: str, path: str, prompts: Sequence[Prompt], config: ReportConfig, scorer: Scorer, advance: Any
) -> Subject:
    model = load(path, device=config.device)
    tokenizer = tokenizer_of(model)
    repeated = [prompt for prompt in prompts for _ in range(config.num)]
    answers: list[Sample] = []
    for start in range(0, len(repeated), config.batch_size):
        some = repeated[start : start + config.batch_size]
        answers += sample(model, tokenizer, some, config.sampling(start))
        advance(len(some))
    scores = scorer([prompt.content for prompt in repeated], [answer.text for answer in answers])
    return Subject(name, path, model, tokenizer, answers, scores)


def _side_by_side(base: Subject, aligned: Subject, prompts: Sequence[Prompt], num: int) -> list[dict[str, Any]]:
    def answers(subject: Subject, number: int) -> list[dict[str, Any]]:
        part = slice(number * num, (number + 1) * num)
        return [
            {"text": answer.text, "finished": answer.finished, "score": score}
            for answer, score in zip(subject.answers[part], subject.scores[part], strict=True)
        ]

    return [
        {"prompt": prompt.content, "base": answers(base, i), "aligned": answers(aligned, i)}
        for i, prompt in enumerate(prompts)
    ]


# --- measures ---


def _described(subject: Subject) -> dict[str, Any]:
    return {"name": subject.name, "path": subject.path, "parameters": subject.model.num_parameters()}


def _measures(subject: Subject) -> dict[str, float]:
    """Means over the answers; distinct-n is of all of them together."""
    texts, answers = subject.texts, subject.answers
    return {
        "score": _mean(subject.scores),
        **{f"rep_{n}": _mean([rep_n(text, n) for text in texts]) for n in REP},
        "diversity": _mean([diversity(text) for text in texts]),
        **{f"distinct_{n}": distinct_n(texts, n) for n in DISTINCT},
        "words": _mean([len(words(text)) for text in texts]),
        "tokens": _mean([len(answer.ids) for answer in answers]),
        "finished": _mean([answer.finished for answer in answers]),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _contest(base: Subject, aligned: Subject) -> Tally:
    """Answer against answer to the same prompt: who has the higher score."""
    wins = sum(b > a for a, b in zip(base.scores, aligned.scores, strict=True))
    losses = sum(b < a for a, b in zip(base.scores, aligned.scores, strict=True))
    return Tally(wins, losses, len(base.scores) - wins - losses)


def _kl(base: Subject, aligned: Subject, prompts: Sequence[Prompt], num: int) -> dict[str, Any]:
    """KL(aligned || base) on the aligned model's answers, in nats; None where the vocabularies differ.

    Of the models' own distributions, at temperature 1, whatever the answers were drawn with.
    """
    if base.tokenizer.digest() != aligned.tokenizer.digest():
        return {"per_token": None, "per_answer": None, "note": "the two models have different tokenizers"}
    ids = [prompt.ids(aligned.tokenizer) for prompt in prompts for _ in range(num)]
    completions = [Completion(tuple(prompt), answer.ids) for prompt, answer in zip(ids, aligned.answers, strict=True)]
    per_answer = [kl.sum().item() for kl in divergence(aligned.model, base.model, completions)]
    tokens = sum(len(answer.ids) for answer in aligned.answers)
    return {"per_token": math.fsum(per_answer) / tokens, "per_answer": _mean(per_answer), "note": ""}


def _read_text(spec: str, text_field: str, num_chars: int) -> list[tuple[str, bool]]:
    """The first `num_chars` characters of a corpus: documents, each with whether it is whole."""
    documents: list[tuple[str, bool]] = []
    for document in corpus(spec, text_field=text_field):
        text = document.text[:num_chars]
        documents.append((text, len(text) == len(document.text)))
        num_chars -= len(text)
        if not num_chars:
            break
    return documents


def _heldout(subject: Subject, documents: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """Loss in nats a token (the EOS of whole documents included), perplexity, bits per byte."""
    tokenizer = subject.tokenizer
    completions = []
    for text, whole in documents:
        first, *rest = tokenizer.document(text) if whole else tokenizer.prompt(text)
        completions.append(Completion((first,), tuple(rest)))
    scored = logprobs(subject.model, completions)
    nats = -math.fsum(x.double().sum().item() for x in scored)
    tokens = sum(len(x) for x in scored)
    num_bytes = sum(len(text.encode("utf-8")) for text, _ in documents)
    if not math.isfinite(nats):
        raise DataError(f"the loss of {subject.name} on the held-out text is {nats}; its weights may be damaged")
    return {
        "tokens": tokens,
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700)),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }
