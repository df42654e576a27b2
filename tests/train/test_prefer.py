"""`glade prefer`: rows that train, the same whatever interrupts or batches the job, and honest counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glade.config import load as load_config
from glade.data.preference import read_pairs
from glade.data.templates import TEMPLATES
from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError, DataError
from glade.model import LanguageModel, ModelConfig
from glade.train import prefer
from glade.train.prefer import run
from glade.train.prefer_config import PreferConfig

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that writes a few letters and often ends."""
    folder = tmp_path_factory.mktemp("model") / "c"
    t = Tokenizer.build("char", ["".join(chr(i) for i in range(32, 127)) + "\n"])
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(mixer="gla", vocab_size=t.vocab_size, dim=16, num_layers=1, tie_embeddings=False))
    with torch.no_grad():
        assert model.lm_head is not None
        likely = [*t.encode("ab. "), t.eos_id]
        model.lm_head.weight[likely] += 0.3 * torch.randn(1, 16)
        model.lm_head.weight[likely] *= 8
    model.save_pretrained(folder, t)
    return str(folder)


@pytest.fixture
def make(checkpoint: str, tmp_path: Path) -> Callable[..., Rows]:
    def _make(**settings: Any) -> Rows:
        values = {"checkpoint": checkpoint, "out": tmp_path / "pairs.jsonl", "num_prompts": 7, "max_new_tokens": 40}
        run(PreferConfig(**(values | {"device": "cpu"} | settings)))
        return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]

    return _make


def stats(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "pairs.stats.json").read_text())


def test_against_the_reference(make: Callable[..., Rows], checkpoint: str, tmp_path: Path) -> None:
    rows = make(max_new_tokens=400, num=3)
    assert set(rows[0]) == {"prompt", "chosen", "rejected"}
    assert len({row["prompt"] for row in rows}) == 7
    for row in rows:
        assert 4 <= len(row["prompt"].split()) <= 16
        # the reference is what followed in the story, whole
        assert row["chosen"].rstrip().endswith((".", '"')) and row["chosen"][0] in " \n" and len(row["chosen"]) > 100
    pairs = read_pairs(tmp_path / "pairs.jsonl", Tokenizer.load(checkpoint))
    assert len(pairs) == len(rows) == stats(tmp_path)["pairs"]
    counted = stats(tmp_path)
    assert counted["prompts"] == 7 and counted["samples"] == 21 and counted["mean_gap"] is None
    assert counted["pairs"] + sum(counted["left_out"].values()) == 21


def test_references_are_cut_as_samples_are(make: Callable[..., Rows]) -> None:
    rows = make(max_new_tokens=150)
    assert max(len(row["chosen"]) for row in rows) <= 150
    assert all(row["chosen"].endswith((".", "!", "?", '"')) for row in rows)


def test_best_against_worst(make: Callable[..., Rows], tmp_path: Path) -> None:
    taste = tmp_path / "taste.py"
    taste.write_text("def count(prompt, answer):\n    return answer.count('a')\n")
    rows = make(scorer=f"{taste}:count", num=6)
    for row in rows:
        assert row["score_chosen"] == row["chosen"].count("a") > row["score_rejected"] == row["rejected"].count("a")
    counted = stats(tmp_path)
    gaps = [row["score_chosen"] - row["score_rejected"] for row in rows]
    assert counted["mean_gap"] == pytest.approx(sum(gaps) / len(gaps))
    limit = min(gaps)
    assert limit < max(gaps)
    kept = make(scorer=f"{taste}:count", num=6, min_gap=limit, overwrite=True)
    assert kept == [row for row, gap in zip(rows, gaps, strict=True) if gap > limit]
    assert stats(tmp_path)["left_out"]["ties"] == counted["left_out"].get("ties", 0) + len(rows) - len(kept)


def test_under_a_judge(make: Callable[..., Rows], checkpoint: str) -> None:
    rows = make(scorer="logprob", judge=checkpoint, num=3)
    assert all(0 > row["score_chosen"] > row["score_rejected"] for row in rows)


def test_batches_and_seeds(make: Callable[..., Rows]) -> None:
    rows = make(num=3)
    assert make(num=3, batch_size=4, overwrite=True) == rows
    assert make(num=3, seed=1, overwrite=True) != rows


@pytest.mark.parametrize("cut", [0, 25])
def test_an_interrupted_job_goes_on(
    cut: int, make: Callable[..., Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = make(num=3, batch_size=6)
    (tmp_path / "pairs.jsonl").unlink()
    real, calls = prefer.sample, []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(prefer, "sample", fails)
    with pytest.raises(KeyboardInterrupt):
        make(num=3, batch_size=6)
    part = tmp_path / ".pairs.jsonl.part"
    assert not (tmp_path / "pairs.jsonl").exists() and part.exists()
    # as if it had been killed while it wrote its last line
    part.write_bytes(part.read_bytes()[: -cut or None])
    with pytest.raises(ConfigError, match="other settings, prompts or weights"):
        make(num=3, seed=9)
    capsys.readouterr()
    assert make(num=3, batch_size=9) == whole
    assert f"going on after {4 if not cut else 3} of 7" in capsys.readouterr().out
    assert not part.exists()
    # what was made before the interruption was not made again
    assert sum(len(args[2]) for args in calls[3:]) == 3 * (3 if not cut else 4)


def test_no_pair_is_an_error_that_leaves_nothing(make: Callable[..., Rows], tmp_path: Path) -> None:
    (tmp_path / "same.py").write_text("def score(prompt, answer):\n    return 1\n")
    with pytest.raises(DataError, match=r"no pair is left: .*7 ties"):
        make(scorer=f"{tmp_path}/same.py:score")
    assert [path.name for path in tmp_path.glob("*pairs*")] == []


def test_nothing_is_overwritten_unasked(make: Callable[..., Rows], tmp_path: Path) -> None:
    make()
    with pytest.raises(ConfigError, match="exists"):
        make()


def test_prompts_of_ones_own(make: Callable[..., Rows], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One day\nAt noon\n")
    taste = tmp_path / "taste.py"
    taste.write_text("def length(prompt, answer):\n    return len(answer)\n")
    rows = make(prompts=prompts, scorer=f"{taste}:length", num=8)
    assert {row["prompt"] for row in rows} <= {"One day", "At noon"} and rows
    with pytest.raises(ConfigError, match="needs a 'reference'"):
        make(prompts=prompts, overwrite=True)
    texts = tmp_path / "texts.txt"
    texts.write_text("One two three four five six.\n<|endoftext|>\nToo short\n")
    rows = make(corpus=str(texts), min_words=3, max_words=3, overwrite=True)
    assert {(row["prompt"], row["chosen"]) for row in rows} == {("One two three", " four five six.")}


def test_messages_as_prompts(make: Callable[..., Rows], checkpoint: str, tmp_path: Path) -> None:
    t = Tokenizer.load(checkpoint)
    model = LanguageModel.from_pretrained(checkpoint)
    t.chat_template = TEMPLATES["alpaca"]
    model.save_pretrained(tmp_path / "chat", t)
    prompts = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Say ab."}]
    prompts.write_text(json.dumps({"prompt": messages, "reference": "ab."}) + "\n")
    rows = make(checkpoint=str(tmp_path / "chat"), prompts=prompts)
    assert rows[0]["prompt"] == messages and rows[0]["chosen"] == "ab."
    pairs = read_pairs(tmp_path / "pairs.jsonl", t)
    assert list(pairs[0].prompt) == t.chat_ids(messages)


def test_settings_that_cannot_be_honoured() -> None:
    for wrong in (
        {"out": "a.json"},
        {"prompts": "a.txt", "corpus": "b"},
        {"num": 0},
        {"num": 1, "scorer": "repetition"},
        {"min_gap": 0.1},
        {"temperature": 0.0},
        {"max_words": 3},
        {"top_p": 0.0},
        {"seed": -1},
        {"unfinished": "pad"},
    ):
        with pytest.raises(ConfigError):
            load_config(PreferConfig, overrides={"checkpoint": "c", "out": "a.jsonl", **wrong})
