"""Preference files of every layout as token ids; every bad row told with its line; a split that no order changes."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from glade.config import load
from glade.data.preference import Pair, load_pairs, read_pairs
from glade.data.rows import RowsConfig
from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError, DataError

STORY = {"prompt": "The fox saw a", "chosen": " red ball.", "rejected": " a a a"}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(*rows: Any, name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return path

    return _write


@pytest.fixture
def byte() -> Tokenizer:
    return Tokenizer.build("byte")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.build("bpe:275", ["the cat sat on the mat, then the cats sat there together " * 20])


def texts(pair: Pair, t: Tokenizer) -> tuple[str, ...]:
    return tuple(t.model.decode(list(ids), skip_special_tokens=False) for ids in pair)


def test_plain_rows(write: Write, byte: Tokenizer) -> None:
    (pair,) = read_pairs(write(STORY | {"score": 3}), byte)
    assert pair.prompt == (byte.bos_id, *b"The fox saw a")
    assert pair.chosen == (*b" red ball.", byte.eos_id)
    assert pair.rejected == (*b" a a a", byte.eos_id)
    assert byte.chat_template is None


def test_no_merge_crosses_the_border(write: Write, bpe: Tokenizer) -> None:
    row = {"prompt": "the cat sat on th", "chosen": "e mat", "rejected": "ere"}
    (pair,) = read_pairs(write(row), bpe)
    assert list(pair.prompt) == bpe.prompt("the cat sat on th")
    assert list(pair.chosen) == [*bpe.encode("e mat"), bpe.eos_id]
    joined = [*pair.prompt, *pair.chosen[:-1]]
    assert joined != bpe.prompt("the cat sat on the mat"), "the text has a merge at the border, or this shows nothing"
    assert bpe.decode(joined) == "the cat sat on the mat"


def test_sentencepiece_adds_no_space_at_the_border(write: Write) -> None:
    try:
        t = Tokenizer.build("mistral")
    except DataError:
        pytest.skip("mistral-common is not installed")
    (pair,) = read_pairs(write({"prompt": "Once up", "chosen": "on a time", "rejected": " and away"}), t)
    assert t.decode([*pair.prompt, *pair.chosen]) == "Once upon a time"
    assert t.decode([*pair.prompt, *pair.rejected]) == "Once up and away"


def test_without_a_prompt_an_answer_begins_the_document(write: Write, byte: Tokenizer) -> None:
    (pair,) = read_pairs(write({"prompt": "", "chosen": "one", "rejected": "two"}), byte)
    assert pair.prompt == (byte.bos_id,) and pair.chosen == (*b"one", byte.eos_id)


def test_a_separator_belongs_to_the_completion(write: Write, byte: Tokenizer) -> None:
    (pair,) = read_pairs(write({"prompt": "one", "chosen": "two", "rejected": "six"}), byte, separator=" ")
    assert (bytes(pair.prompt[1:]), bytes(pair.chosen[:-1])) == (b"one", b" two")


QUESTION = {"role": "user", "content": "What is red?"}
GOOD, BAD = {"role": "assistant", "content": "A ball."}, {"role": "assistant", "content": "No."}
# every way to say the same pair
CHATS = {
    "messages": {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "ultrafeedback": {"prompt": "What is red?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "prompt messages": {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
    "prompt messages, whole": {"prompt": [QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "prompt messages, texts": {"prompt": [QUESTION], "chosen": "A ball.", "rejected": "No."},
    "hh": {
        "chosen": "\n\nHuman: What is red?\n\nAssistant: A ball.",
        "rejected": "\n\nHuman: What is red?\n\nAssistant: No.",
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "What is red?"}],
        "chosen": {"from": "gpt", "value": "A ball."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "alpaca": {"instruction": "What is red?", "input": "", "output": "x", "chosen": "A ball.", "rejected": "No."},
}


@pytest.mark.parametrize("layout", CHATS)
def test_conversations(layout: str, write: Write, byte: Tokenizer) -> None:
    (pair,) = read_pairs(write(CHATS[layout]), byte)
    prompt = "<|endoftext|>User:\nWhat is red?\nAssistant:\n"
    assert texts(pair, byte) == (prompt, "A ball.<|endoftext|>", "No.<|endoftext|>")
    # what generation will read is what was trained on
    assert list(pair.prompt) == byte.chat_ids([QUESTION])


def test_many_turns(write: Write, byte: Tokenizer) -> None:
    before = [{"role": "system", "content": "Be brief."}, QUESTION, BAD, {"role": "user", "content": "Why?"}]
    (pair,) = read_pairs(write({"chosen": [*before, GOOD], "rejected": [*before, BAD]}), byte)
    assert texts(pair, byte)[0] == (
        "<|endoftext|>Be brief.\n\nUser:\nWhat is red?\nAssistant:\nNo.<|endoftext|>\nUser:\nWhy?\nAssistant:\n"
    )
    assert list(pair.prompt) == byte.chat_ids(before)


def test_the_template_is_chosen_and_travels(write: Write, byte: Tokenizer, tmp_path: Path) -> None:
    (pair,) = read_pairs(write(CHATS["messages"]), byte, chat_template="alpaca")
    assert texts(pair, byte)[0] == "<|endoftext|>### Instruction:\nWhat is red?\n\n### Response:\n"
    byte.save(tmp_path / "t")
    again = Tokenizer.load(tmp_path / "t")
    assert read_pairs(write(CHATS["messages"]), again) == [pair]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_compressed_and_lists(suffix: str, write: Write, byte: Tokenizer, tmp_path: Path) -> None:
    press = {
        "": bytes,
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }[suffix]
    expected = read_pairs(write(STORY), byte)
    lines, listed = tmp_path / f"a.jsonl{suffix}", tmp_path / f"a.json{suffix}"
    lines.write_bytes(press(b"\xef\xbb\xbf" + json.dumps(STORY).encode() + b"\r\n\r\n"))
    listed.write_bytes(press(json.dumps([STORY], indent=2).encode()))
    assert read_pairs(lines, byte) == read_pairs(listed, byte) == expected


def test_parquet(byte: Tokenizer, tmp_path: Path) -> None:
    rows = [CHATS["ultrafeedback"] | {"prompt_id": "a"}, CHATS["messages"] | {"prompt": None, "prompt_id": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_pairs(tmp_path / "a.parquet", byte)
    assert first == second and bytes(first.chosen[:-1]) == b"A ball."
    pq.write_table(pa.Table.from_pylist([STORY, {**STORY, "chosen": ""}]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: row 2: 'chosen' is empty"):
        read_pairs(tmp_path / "b.parquet", byte)
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable parquet"):
        read_pairs(tmp_path / "c.parquet", byte)


# row -> what is said of it
WRONG: list[tuple[Any, str]] = [
    ("{'prompt': 1}", "not valid JSON"),
    ([1, 2], "a list, not an object"),
    ({"prompt": "a", "chosen": "b"}, "no 'rejected'; its keys are 'prompt', 'chosen'"),
    ({"chosen": "b", "rejected": "c"}, "'chosen' does not begin with"),
    ({"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' is a number, not a text"),
    ({"prompt": "a", "chosen": None, "rejected": "c"}, "'chosen' is null, not a text"),
    ({"prompt": "a", "chosen": " \n", "rejected": "c"}, "'chosen' is empty"),
    ({"prompt": "a", "chosen": "c", "rejected": "c"}, "are the same"),
    ({"prompt": "a", "chosen": "\ud800", "rejected": "c"}, "lone surrogate"),
    ({"chosen": [QUESTION], "rejected": [QUESTION, BAD]}, "'chosen' ends with a turn of 'user'"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "nothing that it answers"),
    ({"chosen": [QUESTION, GOOD], "rejected": [BAD, QUESTION, BAD]}, "differ before the assistant's last turn"),
    ({"chosen": [QUESTION, {"role": "assistant"}], "rejected": [QUESTION, BAD]}, "chosen[1]: no 'content'"),
    ({"chosen": "x", "rejected": [QUESTION, BAD]}, "'chosen' is not a list"),
    ({"prompt": [QUESTION], "chosen": [BAD, QUESTION, GOOD], "rejected": [BAD]}, "nor is one answer"),
    ({"chosen": [QUESTION, {**GOOD, "content": " "}], "rejected": [QUESTION, BAD]}, "last turn in 'chosen' is empty"),
    ({"prompt": [{**QUESTION, "content": "<|endoftext|>"}], "chosen": "a", "rejected": "b"}, "special token"),
    ({"prompt": [{**QUESTION, "role": "tool"}], "chosen": "a", "rejected": "b"}, "unknown role tool"),
    ({"conversations": [{"from": "bot", "value": "a"}], "chosen": {}, "rejected": {}}, "'from' is 'bot'"),
    ({"instruction": " ", "chosen": "a", "rejected": "b"}, "'instruction' is empty"),
    (STORY | {"tie": True}, "a tie"),
]


@pytest.mark.parametrize(("row", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_bad_row_is_told_with_its_line(row: Any, said: str, write: Write, byte: Tokenizer) -> None:
    with pytest.raises(DataError) as error:
        read_pairs(write(STORY, "", row, STORY), byte)
    assert f"pairs.jsonl:3: {said}" in str(error.value) or (
        "pairs.jsonl:3: " in str(error.value) and said in str(error.value)
    )
    assert "1 of 3 rows" in str(error.value)


def test_unknown_characters_are_told(write: Write) -> None:
    t = Tokenizer.build("char", [json.dumps(STORY)])
    with pytest.raises(DataError, match=r"(?s)pairs.jsonl:2: .*'ß'"):
        read_pairs(write(STORY, STORY | {"chosen": "ß"}), t)
    with pytest.raises(DataError, match=r"(?s)pairs.jsonl:1: .*'U'"):
        read_pairs(write(CHATS["messages"]), t)


def test_all_problems_at_once_then_a_count(write: Write, byte: Tokenizer) -> None:
    path = write(*[{"prompt": str(i)} for i in range(8)], STORY)
    with pytest.raises(DataError) as error:
        read_pairs(path, byte)
    said = str(error.value)
    assert "8 of 9 rows cannot be used" in said and "bad_rows=drop" in said
    assert [f"pairs.jsonl:{i}:" in said for i in range(1, 9)] == [True] * 5 + [False] * 3
    assert said.endswith("and 3 more")


def test_dropping_is_asked_for_and_counted(write: Write, byte: Tokenizer, capsys: pytest.CaptureFixture) -> None:
    path = write(STORY, {"prompt": "a"}, STORY | {"chosen": "x" * 40})
    with pytest.raises(DataError, match="bad_rows=drop and too_long=drop"):
        read_pairs(path, byte, max_tokens=30)
    with pytest.raises(DataError, match=r"1 of 3 rows cannot be used.*\n.*:3: 55 tokens, max_tokens is 30"):
        read_pairs(path, byte, max_tokens=30, bad_rows="drop")
    capsys.readouterr()
    assert len(read_pairs(path, byte, max_tokens=30, bad_rows="drop", too_long="drop")) == 1
    assert "dropped 1 bad and 1 too long of 3 rows" in capsys.readouterr().err
    with pytest.raises(DataError, match="no row is left of 1"):
        read_pairs(write({}), byte, bad_rows="drop")


def test_the_limit_is_exact(write: Write, byte: Tokenizer) -> None:
    (pair,) = read_pairs(write(STORY), byte)
    longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
    assert read_pairs(write(STORY), byte, max_tokens=longest) == [pair]
    with pytest.raises(DataError):
        read_pairs(write(STORY), byte, max_tokens=longest - 1)


def test_unknown_suffix_and_damage(write: Write, byte: Tokenizer) -> None:
    with pytest.raises(DataError, match="unknown kind of file"):
        read_pairs(write(STORY, name="a.csv"), byte)
    with pytest.raises(DataError, match="an object, not a list"):
        read_pairs(write(STORY, name="a.json"), byte)
    with pytest.raises(DataError, match="not valid JSON"):
        read_pairs(write("[{]", name="a.json"), byte)
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(Path("nowhere.jsonl"), byte)


def test_the_split_is_by_prompt_and_no_order_changes_it(write: Write, byte: Tokenizer) -> None:
    rows = [{"prompt": f"p{i % 20}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)]
    split = load_pairs(RowsConfig(file=write(*rows), heldout=0.2), byte, seed=1)
    assert len(split.train) == 48 and len(split.heldout) == 12
    assert not {pair.prompt for pair in split.train} & {pair.prompt for pair in split.heldout}
    again = load_pairs(RowsConfig(file=write(*rows[::-1], rows[3]), heldout=0.2), byte, seed=1)
    assert {pair.prompt for pair in again.heldout} == {pair.prompt for pair in split.heldout}
    other = load_pairs(RowsConfig(file=write(*rows), heldout=0.2), byte, seed=2)
    assert {pair.prompt for pair in other.heldout} != {pair.prompt for pair in split.heldout}
    assert load_pairs(RowsConfig(file=write(*rows), heldout=0), byte, seed=1).heldout == []
    with pytest.raises(DataError, match="at least 2"):
        load_pairs(RowsConfig(file=write(STORY)), byte, seed=1)


def test_a_heldout_file_shares_no_prompt(write: Write, byte: Tokenizer) -> None:
    other = write(STORY | {"prompt": "Another"}, name="heldout.jsonl")
    split = load_pairs(RowsConfig(file=write(STORY), heldout_file=other), byte, seed=0)
    assert len(split.train) == len(split.heldout) == 1
    with pytest.raises(DataError, match="1 of 1 rows have a prompt"):
        load_pairs(RowsConfig(file=other, heldout_file=other), byte, seed=0)


def test_settings_that_cannot_be_honoured() -> None:
    for wrong in ({"heldout": 1.0}, {"max_tokens": 2}, {"too_long": "drop"}, {"bad_rows": "skip"}):
        with pytest.raises(ConfigError):
            load(RowsConfig, overrides={"file": "a.jsonl", **wrong})
