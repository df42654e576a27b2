"""`glade prefer`: preference pairs from a model's own samples, ranked by a scorer or set against a reference.

A row is {"prompt", "chosen", "rejected"} and, where a scorer ranked them, "score_chosen" and "score_rejected". Sample n
of a seed is a function of (seed, n) alone: neither the size of the batches nor an interruption changes a row.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from glade import config as settings
from glade.data.corpus import corpus, credits
from glade.data.progress import count_bar
from glade.data.readers import Document
from glade.data.synthetic import stories
from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError, DataError
from glade.evals.scorers import Scorer, make_scorer
from glade.infer.generate import tokenizer_of
from glade.infer.prompts import Prompt, beginnings, read_prompts
from glade.infer.samples import Sample, cut_to_sentence, sample
from glade.interop.load import load
from glade.model.atomic import write_file_atomically
from glade.model.lm import LanguageModel
from glade.train.log import stdout
from glade.train.prefer_config import PreferConfig

# Stories of this seed are in no corpus: a model trained on `stories` has not read them.
_FRESH_STORIES = 7_919
# what does not change a row, so that an interrupted job may go on with other values
_FREE = ("out", "device", "batch_size", "overwrite")


class Made(NamedTuple):
    """What became of one prompt: rows to write, and counts of what was left out, by reason."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]


def run(config: PreferConfig) -> None:
    """The verb `glade prefer`: write the pairs, or go on writing them, and print what they are like."""
    if config.out.exists() and not config.overwrite:
        raise ConfigError(f"{config.out} exists; give another out, or --overwrite")
    prompts = list(islice(_prompts(config), config.num_prompts))
    if not prompts:
        raise DataError("there is no prompt: every document is shorter than min_words; give another corpus")
    if config.scorer == "reference" and any(prompt.reference is None for prompt in prompts):
        raise ConfigError(f"scorer=reference needs a 'reference' in every row of {config.prompts}; or name a scorer")
    scorer = None if config.scorer == "reference" else make_scorer(config.scorer, config.judge, config.device)
    model = load(config.checkpoint, device=config.device, dtype=config.dtype)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    part = config.out.with_name(f".{config.out.name}.part")
    key = _key(config, prompts, model)
    done = [] if config.overwrite else _read_part(part, key, config)
    if done:
        stdout(f"going on after {len(done)} of {len(prompts)} prompts")
    done += _make(config, model, prompts, len(done), scorer, part, key)
    stats = statistics(done)
    if not stats["pairs"]:
        part.unlink()
        raise DataError(f"no pair is left: {_listed(stats['left_out'])}; draw more samples, or longer ones")
    _finish(config, done, stats)
    part.unlink()


def _prompts(config: PreferConfig) -> Iterator[Prompt]:
    if config.prompts is not None:
        return iter(read_prompts(config.prompts))
    if config.corpus is not None:
        documents = corpus(config.corpus, text_field=config.text_field)
    else:
        # a few stories are too short to be a prompt
        fresh = stories(2 * config.num_prompts, seed=_FRESH_STORIES + config.seed)
        documents = (Document(text, f"story {i}") for i, text in enumerate(fresh))
    return beginnings(documents, min_words=config.min_words, max_words=config.max_words, seed=config.seed)


def _make(
    config: PreferConfig,
    model: LanguageModel,
    prompts: Sequence[Prompt],
    first: int,
    scorer: Scorer | None,
    part: Path,
    key: str,
) -> list[Made]:
    """The prompts from number `first` on, each batch of them on the disk before the next begins."""
    tokenizer = tokenizer_of(model)
    step = max(1, config.batch_size // config.num)
    made: list[Made] = []
    with count_bar("prompts", len(prompts)) as advance, open(part, "a" if first else "w", encoding="utf-8") as file:
        if not first:
            _write(file, [{"key": key}])
        advance(first)
        for start in range(first, len(prompts), step):
            some = prompts[start : start + step]
            repeated = [prompt for prompt in some for _ in range(config.num)]
            samples = sample(model, tokenizer, repeated, config.sampling(start * config.num))
            new = [
                _pairs(prompt, samples[i * config.num : (i + 1) * config.num], config, tokenizer, scorer)
                for i, prompt in enumerate(some)
            ]
            _write(file, [one._asdict() for one in new])
            made += new
            advance(len(some))
    return made


def _pairs(
    prompt: Prompt, samples: Sequence[Sample], config: PreferConfig, tokenizer: Tokenizer, scorer: Scorer | None
) -> Made:
    """The pairs of one prompt."""
    counts: Counter[str] = Counter(samples=len(samples))
    answers: list[str] = []
    for one in samples:
        text = one.text if one.finished else _ended(one.text, config.unfinished)
        counts["unfinished"] += not one.finished
        if not text.strip():
            counts["without a whole sentence, or empty"] += 1
        elif "\ufffd" in text:
            counts["with bytes that are no text"] += 1
        elif text in answers:
            counts["equal to another sample"] += 1
        else:
            answers.append(text)
    if scorer is None:
        rows = _against_reference(prompt, answers, config, tokenizer, counts)
    else:
        rows = _best_against_worst(prompt, answers, config.min_gap, scorer, counts)
    return Made(rows, dict(counts))


def _ended(text: str, unfinished: str) -> str:
    return {"cut": cut_to_sentence(text), "keep": text, "drop": ""}[unfinished]


def _against_reference(
    prompt: Prompt, answers: list[str], config: PreferConfig, tokenizer: Tokenizer, counts: Counter[str]
) -> list[dict[str, Any]]:
    assert prompt.reference is not None
    ids = tokenizer.continuation(prompt.reference)
    reference = prompt.reference
    if len(ids) > config.max_new_tokens:
        reference = _ended(tokenizer.decode(ids[: config.max_new_tokens]), config.unfinished)
    if not reference.strip():
        counts["references too long, or empty"] += 1
        return []
    counts["equal to the reference"] += reference in answers
    return [{"prompt": prompt.content, "chosen": reference, "rejected": a} for a in answers if a != reference]


def _best_against_worst(
    prompt: Prompt, answers: list[str], min_gap: float, scorer: Scorer, counts: Counter[str]
) -> list[dict[str, Any]]:
    if len(answers) < 2:
        counts["prompts with less than two samples left"] += 1
        return []
    scores = scorer([prompt.content] * len(answers), answers)
    ranked = sorted(zip(scores, answers, strict=True), key=lambda pair: pair[0])
    (low, worst), (high, best) = ranked[0], ranked[-1]
    # of two infinite scores the difference is nan
    if low == high or not high - low > min_gap:
        counts["ties"] += 1
        return []
    return [{"prompt": prompt.content, "chosen": best, "rejected": worst, "score_chosen": high, "score_rejected": low}]


# --- the job on the disk ---


def _key(config: PreferConfig, prompts: Sequence[Prompt], model: LanguageModel) -> str:
    """What the rows are a function of: the settings that change one, the prompts, and the weights themselves."""
    fixed = {key: value for key, value in settings.to_dict(config).items() if key not in _FREE}
    hashed = hashlib.sha256(json.dumps([fixed, prompts]).encode())
    for name, x in model.state_dict().items():
        hashed.update(name.encode())
        hashed.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()


def _write(file: IO[str], rows: Sequence[dict[str, Any]]) -> None:
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())


def _read_part(part: Path, key: str, config: PreferConfig) -> list[Made]:
    """What an interrupted job has made; a line that was cut short is taken off the file."""
    if not part.is_file():
        return []
    content = part.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    head, *rows = [json.loads(line) for line in whole.splitlines()] or [{"key": key}]
    if head["key"] != key:
        raise ConfigError(
            f"{part} is an interrupted job of other settings, prompts or weights; repeat that command to finish it, or "
            f"give --overwrite to begin anew"
        )
    if not rows:
        return []
    if len(whole) < len(content):
        write_file_atomically(part, whole)
    return [Made(**row) for row in rows]


def _finish(config: PreferConfig, made: Sequence[Made], stats: dict[str, Any]) -> None:
    rows = [row for one in made for row in one.rows]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file_atomically(config.out, lines.encode("utf-8"))
    source = config.corpus or ("stories" if config.prompts is None else "")
    notes = {"settings": settings.to_dict(config), "credits": credits([source]) if source else []}
    content = json.dumps(stats | notes, indent=2, ensure_ascii=False) + "\n"
    write_file_atomically(config.out.with_name(config.out.stem + ".stats.json"), content.encode("utf-8"))
    _print(config, stats)


def statistics(made: Sequence[Made]) -> dict[str, Any]:
    """Counts and means over all pairs; scores are None where nothing was scored."""
    rows = [row for one in made for row in one.rows]
    counts: Counter[str] = Counter()
    for one in made:
        counts.update(one.counts)
    samples = counts.pop("samples", 0)
    scored = [(row["score_chosen"], row["score_rejected"]) for row in rows if "score_chosen" in row]
    return {
        "prompts": len(made),
        "samples": samples,
        "pairs": len(rows),
        "left_out": {reason: count for reason, count in counts.items() if count and reason != "unfinished"},
        "unfinished": counts["unfinished"],
        "mean_score_chosen": _mean([a for a, _ in scored]),
        "mean_score_rejected": _mean([b for _, b in scored]),
        "mean_gap": _mean([a - b for a, b in scored]),
        "mean_chars_chosen": _mean([len(row["chosen"]) for row in rows]),
        "mean_chars_rejected": _mean([len(row["rejected"]) for row in rows]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _print(config: PreferConfig, stats: dict[str, Any]) -> None:
    stdout(
        f"{stats['pairs']} pairs of {stats['prompts']} prompts and {stats['samples']} samples "
        f"({stats['unfinished']} of them unfinished: {config.unfinished})"
    )
    if stats["left_out"]:
        stdout(f"left out: {_listed(stats['left_out'])}")
    if stats["mean_gap"] is not None:
        stdout(
            f"mean score {stats['mean_score_chosen']:.4f} chosen, {stats['mean_score_rejected']:.4f} rejected: "
            f"gap {stats['mean_gap']:.4f}"
        )
    stdout(
        f"mean length {stats['mean_chars_chosen']:.0f} characters chosen, {stats['mean_chars_rejected']:.0f} rejected"
    )
    stdout(f"in {config.out}; train on it with: glade dpo {config.checkpoint} {config.out}")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "nothing was drawn"
