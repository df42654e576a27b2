"""Prompts out of files and documents, and whole answers to them."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glade.data.readers import Document
from glade.data.tokenizer import Tokenizer
from glade.errors import DataError
from glade.infer.config import SamplingParams
from glade.infer.generate import generate
from glade.infer.prompts import Prompt, beginnings, read_prompts
from glade.infer.samples import cut_to_sentence, sample
from glade.model import LanguageModel, ModelConfig

USER = {"role": "user", "content": "Hi"}


def test_files_of_prompts(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("One day\n\n  Two \nOne day\n")
    assert read_prompts(text) == [Prompt("One day"), Prompt("  Two ")]
    rows = tmp_path / "a.jsonl"
    chosen = [USER, {"role": "assistant", "content": "Hello."}]
    some = [
        {"prompt": "a"},
        {"prompt": "b", "reference": "r", "chosen": "c"},
        {"prompt": "c", "completion": "x"},
        {"prompt": [USER], "chosen": chosen, "rejected": []},
        {"prompt": "a", "reference": "later"},
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in some))
    assert read_prompts(rows) == [Prompt("a"), Prompt("b", "r"), Prompt("c", "x"), Prompt([USER], "Hello.")]
    rows.write_text('{"text": "a"}\n{"prompt": "a", "reference": 3}\n')
    with pytest.raises(DataError, match=r"(?s):1: no 'prompt'.*:2: 'reference' is neither"):
        read_prompts(rows)
    text.write_text("\n")
    with pytest.raises(DataError, match="no prompt in it"):
        read_prompts(text)


@given(st.lists(st.text("ab  \n", max_size=40), max_size=6), st.integers(0, 5))
def test_a_beginning_and_its_rest_are_the_document(texts: list[str], seed: int) -> None:
    documents = [Document(text, "") for text in texts]
    found = list(beginnings(documents, min_words=2, max_words=4, seed=seed))
    whole = [prompt.content + (prompt.reference or "") for prompt in found if isinstance(prompt.content, str)]
    assert all(2 <= len(str(prompt.content).split()) <= 4 for prompt in found)
    left = iter(texts)
    assert all(text in left for text in whole)
    assert len(found) >= sum(len(text.split()) > 4 for text in texts)
    assert found == list(beginnings(documents, min_words=2, max_words=4, seed=seed))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Thr", "One. Two!"),
        ('He said, "Go." And', 'He said, "Go."'),
        ("It costs 3.50 and", ""),
        ("Really?!  ", "Really?!"),
        ("(See there.) x", "(See there.)"),
        ("", ""),
    ],
)
def test_cut_to_sentence(text: str, expected: str) -> None:
    assert cut_to_sentence(text) == expected


def test_samples_are_what_generate_gives_and_end_where_the_model_ends() -> None:
    t = Tokenizer.build("byte")
    model = LanguageModel(ModelConfig(mixer="gla", vocab_size=t.vocab_size, dim=16, num_layers=1, init_std=0.5)).eval()
    # the EOS always among the likely ones
    with torch.no_grad():
        model.embed.weight[t.eos_id] = model.embed.weight[[5, 9]].mean(0)
    texts = ["One", "Two", "Two", ""] * 8
    params = SamplingParams(max_new_tokens=60, seed=5)
    found = sample(model, t, [Prompt(text) for text in texts], params)
    assert [s.text for s in found] == generate(model, texts, tokenizer=t, max_new_tokens=60, seed=5)
    assert {s.finished for s in found} == {True, False}
    for s in found:
        assert s.finished == (s.ids[-1] == t.eos_id) and (s.finished or len(s.ids) == 60)
        assert t.decode([id for id in s.ids if id != t.eos_id]) == s.text
