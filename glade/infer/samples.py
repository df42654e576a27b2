"""Whole samples of many prompts, a batch at a time, each ended where a reader would end it."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from glade.data.tokenizer import Tokenizer
from glade.infer.config import SamplingParams
from glade.infer.decoding import Decoding
from glade.infer.generate import decode_text
from glade.infer.prompts import Prompt
from glade.model.lm import LanguageModel

# the end of a sentence, with the quotation mark or bracket that closes after it
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")


class Sample(NamedTuple):
    """A model's answer: its text, the ids that were drawn (the EOS among them), and whether the model ended it."""

    text: str
    ids: tuple[int, ...]
    finished: bool


def sample(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[Prompt], params: SamplingParams
) -> list[Sample]:
    """One answer to each prompt, in one batch; row r draws with `params.seed` + r.

    Raises:
        DataError, ConfigError: as `glade.infer.generate.stream`.
    """
    return sample_ids(model, tokenizer, [prompt.ids(tokenizer) for prompt in prompts], params)


def sample_ids(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[Sample]:
    """`sample` of prompts that are ids already, special ones among them."""
    decoding = Decoding(model, prompts, params, vocab_size=tokenizer.vocab_size)
    texts = [""] * len(prompts)
    drawn: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for event in decode_text(decoding, tokenizer):
        texts[event.row] += event.text
        drawn[event.row].append(event.token_id)
        finished[event.row] = event.finished in ("eos", "stop")
    return [Sample(text, tuple(ids), ended) for text, ids, ended in zip(texts, drawn, finished, strict=True)]


def cut_to_sentence(text: str) -> str:
    """The text up to the end of its last whole sentence; "" if none ends in it."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""
