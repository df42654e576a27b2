"""Instruction files of every layout: which ids, and which of them are scored; chat templates and what they must do."""

import json
from pathlib import Path
from typing import Any

import pytest

from glade.config import load
from glade.data.instruction import Example, load_examples, read_examples
from glade.data.rows import RowsConfig
from glade.data.templates import TEMPLATES, chat_template
from glade.data.tokenizer import Tokenizer
from glade.errors import DataError

EOS = "<|endoftext|>"
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}


@pytest.fixture
def byte() -> Tokenizer:
    return Tokenizer.build("byte")


def read(row: Any, t: Tokenizer, tmp_path: Path, **settings: Any) -> Example:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return read_examples(path, t, **settings)[0]


def spelled(t: Tokenizer, example: Example) -> str:
    """The example with what is scored in brackets."""
    text, before = "", False
    for id, scored in zip(example.ids, example.scored, strict=True):
        text += "[" * (scored and not before) + "]" * (before and not scored)
        text += t.model.decode([id], skip_special_tokens=False)
        before = scored
    return text + "]" * before


CHAT = f"{EOS}User:\nHi\nAssistant:\n[Hello.{EOS}]"
LAYOUTS: dict[str, tuple[Any, str]] = {
    "prompt": ({"prompt": "2+2=", "completion": "4"}, f"{EOS}2+2=[4{EOS}]"),
    "response": ({"prompt": "2+2=", "response": "4"}, f"{EOS}2+2=[4{EOS}]"),
    "no prompt": ({"prompt": "", "completion": "4"}, f"{EOS}[4{EOS}]"),
    "messages": ({"messages": [USER, ANSWER]}, CHAT),
    "prompt messages": ({"prompt": [USER], "completion": [ANSWER]}, CHAT),
    "prompt messages, text": ({"prompt": [USER], "completion": "Hello."}, CHAT),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, CHAT),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello."}, CHAT),
    "dolly": ({"instruction": "Hi", "context": "", "response": "Hello.", "category": "open"}, CHAT),
    "alpaca with input": (
        {"instruction": "Spell", "input": "cat", "output": "c a t"},
        f"{EOS}User:\nSpell\n\ncat\nAssistant:\n[c a t{EOS}]",
    ),
    "two turns": (
        {"messages": [{"role": "system", "content": "S"}, USER, ANSWER, {**USER, "content": "Bye"}, ANSWER]},
        f"{EOS}S\n\nUser:\nHi\nAssistant:\n[Hello.{EOS}]\nUser:\nBye\nAssistant:\n[Hello.{EOS}]",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_answers_and_their_ends_are_scored(layout: str, byte: Tokenizer, tmp_path: Path) -> None:
    row, expected = LAYOUTS[layout]
    example = read(row, byte, tmp_path)
    assert spelled(byte, example) == expected
    assert not example.scored[0] and example.scored[-1]
    assert len(example.prompt) == example.scored.index(True)


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "byte"])
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_a_conversation_is_what_the_template_writes(kind: str, template: str, tmp_path: Path) -> None:
    try:
        t = Tokenizer.build(kind)
    except DataError:
        pytest.skip(f"{kind} is not installed")
    messages = [USER, ANSWER, {**USER, "content": "  And  you?\n"}, {**ANSWER, "content": "\nFine —  thanks. "}]
    example = read({"messages": messages}, t, tmp_path, chat_template=template)
    whole = t.chat(messages, add_generation_prompt=False).rstrip()
    joined = t.model.decode(list(example.ids), skip_special_tokens=False)
    # SentencePiece decodes a special token with spaces around it
    assert joined.replace(" ", "") == whole.replace(" ", "")
    answers = t.decode([id for id, scored in zip(example.ids, example.scored, strict=True) if scored])
    assert answers.strip() == "Hello.\nFine —  thanks."
    # a model that generates reads the very ids it was trained on
    assert list(example.prompt) == t.chat_ids([USER])


def test_chatml_needs_its_marks(byte: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="chatml"):
        chat_template(byte, "chatml")
    path = tmp_path / "with_marks"
    byte.save(path)
    config = json.loads((path / "tokenizer.json").read_text())
    next_id = byte.vocab_size
    for i, mark in enumerate(("<|im_start|>", "<|im_end|>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        config["added_tokens"].append({"id": next_id + i, "content": mark, "special": True, **flags})
    (path / "tokenizer.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": EOS}))
    t = Tokenizer.load(path)
    assert chat_template(t, "auto") == TEMPLATES["chatml"]
    example = read({"messages": [USER, ANSWER]}, t, tmp_path)
    assert spelled(t, example) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello.<|im_end|>]")
    assert example.ids[0] == t.model.token_to_id("<|im_start|>")


def test_a_template_of_the_users_own(byte: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content|trim }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '<a>' if add_generation_prompt }}"
    )
    example = read({"messages": [USER, {**ANSWER, "content": " Hello. "}]}, byte, tmp_path, chat_template=str(file))
    assert spelled(byte, example) == f"<u>Hi<a>[Hello.{EOS}]"
    assert chat_template(byte, "auto") == file.read_text()
    with pytest.raises(DataError, match="no such file; give auto, plain"):
        chat_template(byte, "llama")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }};{% endfor %}", "does not end the answer in message 1 with the EOS"),
        (
            "{{ messages|length }}{{ eos_token }}{% if add_generation_prompt %}>{% endif %}",
            "does not follow the generation",
        ),
        ("{{ nothing.here }}", "cannot render"),
    ],
)
def test_templates_that_cannot_be_learned_from(template: str, said: str, byte: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "bad.jinja"
    file.write_text(template)
    with pytest.raises(DataError, match=said):
        read({"messages": [USER, ANSWER]}, byte, tmp_path, chat_template=str(file))


def test_a_template_that_rewrites_earlier_turns(byte: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "bad.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.content if m.role == 'user' or loop.last else m.content|upper }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    with pytest.raises(DataError, match="rewrites what stands before message 3"):
        read({"messages": [USER, ANSWER, USER, ANSWER]}, byte, tmp_path, chat_template=str(file))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "no 'messages', 'conversations', 'prompt' or 'instruction'; its keys are 'text'"),
        ({"prompt": "a"}, "no 'completion'"),
        ({"prompt": "a", "completion": " "}, "completion is empty"),
        ({"prompt": "a", "completion": 4}, "'completion' is a number"),
        ({"messages": []}, "at least one message"),
        ({"messages": [USER]}, "ends with a turn of 'user'"),
        ({"messages": [ANSWER]}, "nothing that it answers"),
        ({"messages": [USER, {**ANSWER, "content": None}]}, r"messages\[1\]: 'content' is null"),
        ({"instruction": "a"}, "no 'output'"),
    ],
)
def test_bad_rows(row: Any, said: str, byte: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{said}"):
        read(row, byte, tmp_path)


def test_the_split(byte: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i % 10}", "completion": f"{i}"}) + "\n" for i in range(30)))
    config = load(RowsConfig, overrides={"file": str(path), "heldout": 0.3})
    split = load_examples(config, byte, seed=0)
    assert (len(split.train), len(split.heldout)) == (21, 9)
    assert not {e.prompt for e in split.train} & {e.prompt for e in split.heldout}
