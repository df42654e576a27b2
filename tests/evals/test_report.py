"""The report on two models: its figures against a count of their own, and a page that is whole and safe."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from glade.config import load as load_config
from glade.errors import ConfigError, DataError
from glade.evals.completions import Completion, divergence
from glade.evals.page import render_page
from glade.evals.repetition import diversity, rep_n
from glade.evals.report import make_report, write_report
from glade.infer.generate import generate
from glade.interop.load import load
from glade.train.compare import CompareConfig, run

MakeCheckpoint = Callable[..., str]
EVIL = '<script>alert("x")</script> & <img src=http://example.com/a.png>'


@pytest.fixture(scope="module")
def pair(make_checkpoint: MakeCheckpoint) -> tuple[str, str]:
    return make_checkpoint("base", 1), make_checkpoint("aligned", 2)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "One"}) + "\n" + json.dumps({"prompt": EVIL}) + "\n")
    return path


def config(pair: tuple[str, str], prompts: Path, **settings: Any) -> CompareConfig:
    values = {"runs": pair, "prompts": prompts, "num": 2, "max_new_tokens": 24, "device": "cpu", **settings}
    return CompareConfig(**values)


def test_figures(pair: tuple[str, str], prompts: Path) -> None:
    text = prompts.with_name("heldout.txt")
    text.write_text("one two\n<|endoftext|>\nthree")
    asked = config(pair, prompts, text=str(text))
    report = make_report(*pair, asked)
    assert [model["name"] for model in report["models"]] == ["base", "aligned"]
    assert report["num_prompts"] == 2
    models = [load(path) for path in pair]
    repeated = ["One", "One", EVIL, EVIL]
    for side, model, measures in zip(("base", "aligned"), models, report["measures"], strict=True):
        texts = [answer["text"] for entry in report["answers"] for answer in entry[side]]
        assert texts == generate(model, repeated, max_new_tokens=24, temperature=0.8, seed=0)
        assert measures["rep_2"] == pytest.approx(sum(rep_n(t, 2) for t in texts) / 4)
        assert measures["score"] == pytest.approx(sum(map(diversity, texts)) / 4)
    scores = [[a["score"] for entry in report["answers"] for a in entry[side]] for side in ("base", "aligned")]
    wins = sum(b > a for a, b in zip(*scores, strict=True))
    ties = sum(b == a for a, b in zip(*scores, strict=True))
    assert (report["scores"]["wins"], report["scores"]["ties"]) == (wins, ties)
    assert report["scores"]["win_rate"] == (wins + ties / 2) / 4
    for model, heldout in zip(models, report["heldout"], strict=True):
        t = model.tokenizer
        nats = 0.0
        for one in ("one two", "three"):
            ids = t.document(one)
            with torch.no_grad():
                p = model(torch.tensor([ids]))[0][0, :-1].log_softmax(-1)
            nats -= p.gather(-1, torch.tensor(ids[1:])[:, None]).sum().item()
        assert heldout["tokens"] == len("one two") + len("three") + 2
        assert heldout["loss"] == pytest.approx(nats / heldout["tokens"], rel=1e-5)


def test_kl_is_of_the_aligned_answers(pair: tuple[str, str], prompts: Path) -> None:
    report = make_report(*pair, config(pair, prompts, num=1, temperature=0.0))
    base, aligned = (load(path) for path in pair)
    t = aligned.tokenizer
    total = tokens = 0
    for entry in report["answers"]:
        answer = entry["aligned"][0]
        prompt = tuple(t.prompt(entry["prompt"]))
        ids = _greedy(aligned, prompt, 24)
        assert answer["finished"] == (ids[-1] == t.eos_id)
        total += divergence(aligned, base, [Completion(prompt, ids)])[0].sum().item()
        tokens += len(ids)
    assert report["kl"]["per_token"] == pytest.approx(total / tokens, rel=1e-4)
    assert report["kl"]["per_answer"] == pytest.approx(total / 2, rel=1e-4)


def _greedy(model: Any, prompt: tuple[int, ...], most: int) -> tuple[int, ...]:
    ids = list(prompt)
    while len(ids) - len(prompt) < most and (len(ids) == len(prompt) or ids[-1] != model.tokenizer.eos_id):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), logits="last")[0].argmax()))
    return tuple(ids[len(prompt) :])


def test_different_vocabularies_have_no_kl(make_checkpoint: MakeCheckpoint, pair: tuple[str, str]) -> None:
    other = make_checkpoint("chars", 5, text="abcdefghijklmnopqrstuvwxyz One")
    path = Path(other).parent / "one.txt"
    path.write_text("One\n")
    report = make_report(pair[0], other, config((pair[0], other), path))
    assert report["kl"]["per_token"] is None and "tokenizers" in report["kl"]["note"]
    assert "No KL" in render_page(report)


class _Reader(HTMLParser):
    """Every tag, every attribute that could fetch something, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [f"{key}={value}" for key, value in attrs if key in ("src", "href", "data", "action")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_escaped(pair: tuple[str, str], prompts: Path, tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    vote = {"prompt": "p", "chosen": "x", "rejected": "y", "model_chosen": "aligned", "model_rejected": "base"}
    votes.write_text(json.dumps(vote) + "\n")
    asked = config(pair, prompts, votes=votes, text="stories:2", text_chars=300)
    report = make_report(*pair, asked)
    report["answers"][0]["aligned"][0]["text"] = f"{EVIL} again and again and again and again"
    page, data = write_report(report, tmp_path / "out")
    assert json.loads(data.read_text()) == json.loads(json.dumps(report))
    reader = _Reader()
    content = page.read_text()
    reader.feed(content)
    assert reader.open == [] and reader.fetched == []
    assert not {"script", "img", "link", "iframe", "b"} & set(reader.tags)
    assert "url(" not in content and "@import" not in content
    assert reader.text.count(EVIL) == 2
    assert "votes of people" in reader.text and "100.0 %" in reader.text
    assert "mark" in reader.tags


def test_chat_prompts(make_checkpoint: MakeCheckpoint, pair: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "<i>Hi</i>"}]}) + "\n")
    with pytest.raises(DataError, match="no chat template"):
        make_report(*pair, config(pair, path))
    chats = make_checkpoint("chat", 1, chat=True), make_checkpoint("chat2", 2, chat=True)
    report = make_report(*chats, config(chats, path, temperature=0.0, num=1, scorer="logprob", judge=chats[0]))
    t = load(chats[0]).tokenizer
    ids = _greedy(load(chats[0]), tuple(t.prompt("User:\n<i>Hi</i>\nAssistant:\n")), 24)
    assert report["answers"][0]["base"][0]["text"] == t.decode([id for id in ids if id != t.eos_id])
    assert "user: &lt;i&gt;Hi&lt;/i&gt;" in render_page(report)


def test_the_verb(pair: tuple[str, str], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(config(pair, prompts, out=tmp_path / "out", names=("before", "after")))
    printed = capsys.readouterr().out
    assert "win rate" in printed and "KL" in printed and "before" in printed and "rep-2" in printed
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "report.json"}
    run(config(pair, prompts, out=tmp_path / "out", json=True))
    assert json.loads(capsys.readouterr().out)["num_prompts"] == 2


def test_what_cannot_be_honoured(pair: tuple[str, str], prompts: Path) -> None:
    for overrides, said in (
        ({"runs": ["a", "b"], "scorer": "logprob"}, "without prompts, scorer cannot"),
        ({"runs": ["a", "b"], "seed": 3, "num": 2}, "without prompts, num, seed cannot"),
        ({"runs": ["a"], "prompts": "p.txt"}, "1 models are given"),
        ({"runs": ["a", "b"], "prompts": "p.txt", "names": ["x", "x"]}, "two different ones"),
        ({"runs": ["a", "b"], "prompts": "p.txt", "num": 0}, "at least 1"),
        ({"runs": ["a", "b"], "prompts": "p.txt", "temperature": -1}, "temperature"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(CompareConfig, overrides=overrides)
    with pytest.raises(ConfigError, match="give two models"):
        make_report(pair[0], pair[0], config(pair, prompts))
