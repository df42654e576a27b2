"""Scores against one forward pass, and what the verb prints."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError, DataError
from glade.infer import score as verb
from glade.infer.config import ScoreConfig
from glade.infer.score import score, score_ids
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel

BYTES = Tokenizer.build("byte")


def model_of(**settings: Any) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=BYTES.vocab_size, num_layers=2, dim=32, num_heads=2, init_std=0.3, **settings)
    model: Any = LanguageModel(config).double().eval()
    model.tokenizer = BYTES
    return model


def test_a_score_is_the_sum_of_the_forward_pass() -> None:
    model, text = model_of(), "To be, é!"
    result = score(model, BYTES, text, top=5)
    ids = BYTES.prompt(text)
    logprobs = model(torch.tensor([ids]))[0][0].log_softmax(-1)
    expected = [logprobs[i, id].item() for i, id in enumerate(ids[1:])]
    assert result.token_ids == BYTES.encode(text)
    assert result.logprobs == pytest.approx(expected, abs=1e-5)
    assert result.total == pytest.approx(sum(expected), abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(-sum(expected) / 10), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(-sum(expected) / math.log(2) / 10, rel=1e-5)
    assert (result.num_bytes, result.texts[:3]) == (10, ["T", "o", " "])
    best = logprobs[-1].exp().topk(5)
    assert result.next_ids == best.indices.tolist()
    assert result.next_probabilities == pytest.approx(best.values.tolist(), rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"mixer": "swa", "window": 4}])
def test_a_text_in_pieces_has_the_score_of_the_whole(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    model, ids = model_of(**settings), list(range(40, 60))
    whole, last = score_ids(model, ids)
    for size in (1, 4, 19):
        monkeypatch.setattr(verb, "_PIECE_TOKENS", size)
        pieces, pieces_last = score_ids(model, ids)
        torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(pieces_last, last)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(DataError, match="the text is empty"):
        score(model_of(), BYTES, "")
    with pytest.raises(ConfigError, match="6 tokens with its BOS, the model 5 learned positions"):
        score(model_of(mixer="softmax", learned_positions=5), BYTES, "abcde")
    assert score(model_of(mixer="softmax", learned_positions=6), BYTES, "abcde").num_bytes == 5
    chars = Tokenizer.build("char", ["abc"])
    with pytest.raises(DataError, match="'Z'"):
        score(model_of(), chars, "abZ")
    with pytest.raises(ConfigError, match="one of them"):
        ScoreConfig(checkpoint="x")
    with pytest.raises(ConfigError, match="one of them"):
        ScoreConfig(checkpoint="x", text="a", file=Path("b"))


def test_the_verb_prints_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = model_of()
    monkeypatch.setattr(verb, "load", lambda *_, **__: model)
    file = tmp_path / "a.txt"
    file.write_text("naïve\n", encoding="utf-8")
    verb.run(ScoreConfig(checkpoint="x", file=file, top=2, json=True))
    shown = json.loads(capsys.readouterr().out)
    expected = score(model, BYTES, "naïve\n", top=2)
    assert shown["logprob"] == pytest.approx(expected.total)
    assert (shown["num_tokens"], shown["num_bytes"]) == (7, 7)
    assert [token["id"] for token in shown["tokens"]] == expected.token_ids
    assert [token["text"] for token in shown["next"]] == expected.next_texts


def test_the_verb_prints_lines_for_a_pipe_and_tables_for_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of()
    monkeypatch.setattr(verb, "load", lambda *_, **__: model)
    verb.run(ScoreConfig(checkpoint="x", text="a[b]", top=3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["token", "id", "log p (nats)", "p"]
    assert [line.split("\t")[0] for line in lines[1:5]] == ["'a'", "'['", "'b'", "']'"]
    assert lines[5].split("\t") == ["next token", "id", "p"] and len(lines) == 10
    assert "nats over 4 tokens, 4 bytes; perplexity" in lines[-1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    verb.run(ScoreConfig(checkpoint="x", text="a[b]", top=3))
    shown = capsys.readouterr().out
    assert "'['" in shown and "next token" in shown and "\t" not in shown
