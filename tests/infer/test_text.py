"""From drawn ids to text: stop texts, EOS, half characters, several rows, printing. The model here recites a script."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from glade.data.tokenizer import Tokenizer
from glade.errors import CheckpointError, ConfigError, DataError
from glade.infer import generate as verb
from glade.infer.config import GenerateConfig, SamplingParams
from glade.infer.generate import Event, generate, stream
from glade.infer.text import AnswerText, Stop, TextToken, TokenBytes
from glade.model.state import State

BYTES = Tokenizer.build("byte")


class Heard(NamedTuple):
    """The reciter's state: every id it has read, -1 where there is none yet."""

    ids: Tensor  # [B, 512]


class Reciter(nn.Module):
    """Answers each prompt with the script of that name: whatever the sampling, the next id is certain."""

    def __init__(self, scripts: dict[str, Sequence[int]], learned_positions: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(1, 1)
        self.config = SimpleNamespace(vocab_size=BYTES.vocab_size, learned_positions=learned_positions)
        self.tokenizer = BYTES
        self.scripts = {tuple(BYTES.prompt(prompt)): script for prompt, script in scripts.items()}
        self.rows_stepped: list[int] = []
        self.modes: list[bool] = []

    def init_state(self, batch: int) -> State:
        return State((Heard(torch.full((batch, 512), -1)),), torch.zeros(batch, dtype=torch.int64))

    def forward(
        self, ids: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, logits: str
    ) -> tuple[Tensor, State]:
        assert logits == "none"
        self.modes.append(self.training)
        borders = [0, ids.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        after = self.init_state(len(borders) - 1) if state is None else state.clone()
        for row, (start, end) in enumerate(pairwise(borders)):
            at = int(after.position[row])
            after.layers[0].ids[row, at : at + end - start] = ids[0, start:end]
            after.position[row] += end - start
        return ids, after

    def step_(self, ids: Tensor, state: State, slots: Tensor | None = None) -> Tensor:
        self.modes.append(self.training)
        self.rows_stepped.append(len(ids))
        rows = torch.arange(len(state)) if slots is None else slots
        state.layers[0].ids[rows, state.position[rows]] = ids
        state.position[rows] += 1
        return torch.stack([self.recite(state.layers[0].ids[row, : int(state.position[row])]) for row in rows])

    def recite(self, heard: Tensor) -> Tensor:
        ids = tuple(heard.tolist())
        prompt = max((prompt for prompt in self.scripts if ids[: len(prompt)] == prompt), key=len)
        logits = torch.full((BYTES.vocab_size,), -math.inf)
        logits[self.scripts[prompt][len(ids) - len(prompt)]] = 0.0
        return logits


def script(text: str, *, end: bool = True) -> list[int]:
    return BYTES.encode(text) + [BYTES.eos_id] * end


def events(text: str, **params: Any) -> list[Event]:
    return list(stream(Reciter({"": script(text)}), BYTES, "", SamplingParams(**params)))  # type: ignore[arg-type]


def test_eos_ends_a_row_and_is_no_text() -> None:
    *_, last = got = events("abc")
    assert [event.text for event in got] == ["a", "b", "c", ""]
    assert (last.token_id, last.finished) == (BYTES.eos_id, "eos")
    assert all(event.finished is None for event in got[:-1])
    assert all(event.logprob == 0.0 for event in got)


def test_the_length_ends_a_row_at_the_last_token() -> None:
    got = events("abcdef", max_new_tokens=3)
    assert ["".join(event.text for event in got), len(got), got[-1].finished] == ["abc", 3, "length"]


@pytest.mark.parametrize(
    ("text", "stops", "shown", "drawn"),
    [
        ("one\n\ntwo", ["\n\n"], "one", 5),
        ("say END now", ["END", "now"], "say ", 7),
        ("aaab", ["aab"], "a", 4),
        ("abcabd", ["abd"], "abc", 6),
        ("no such text", ["nothing"], "no such text", 13),
        ("half sto", ["stop"], "half sto", 9),
        ("né", ["é"], "n", 3),
        ("xyz", ["yz", "xy"], "", 2),
    ],
)
def test_stop_texts_end_the_row_and_are_never_shown(text: str, stops: list[str], shown: str, drawn: int) -> None:
    got = events(text, stop=tuple(stops))
    assert ["".join(event.text for event in got), len(got)] == [shown, drawn]
    assert got[-1].finished == ("eos" if shown == text else "stop")


@given(st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_pieces_and_the_whole_stop_at_the_same_place(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    # in a stream the stop that is complete first ends it; of two complete at once, the one that starts first
    ends = [at + len(stop) for stop in stops if (at := whole.find(stop)) >= 0]
    stop, shown = Stop(stops), ""
    for i, piece in enumerate(pieces):
        text, stopped = stop.push(piece)
        shown += text
        if stopped:
            assert len("".join(pieces[: i + 1])) >= min(ends) > len("".join(pieces[:i]))
            break
        assert not any(stop in shown for stop in stops)
    else:
        assert not ends
        shown += stop.flush()
        assert shown == whole
    assert whole.startswith(shown)


def test_no_event_holds_half_a_character() -> None:
    got = events("aé漢🙂b")
    assert [event.text for event in got] == ["a", "", "é", "", "", "漢", "", "", "", "🙂", "b", ""]
    cut = events("é", max_new_tokens=1)
    assert [event.text for event in cut] == ["\ufffd"]  # the length cut it: what came is shown


def answer(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str]) -> tuple[str, list[TextToken]]:
    text, shown, tokens = AnswerText(tokenizer, stop), "", []
    for at, id in enumerate(ids):
        ended = "eos" if id == tokenizer.eos_id else "length" if at == len(ids) - 1 else None
        piece = text.push(id, -float(at), ((id, -float(at)),), ended=ended)
        shown += piece.text
        tokens += piece.tokens
        assert all(token.start <= len(shown) for token in tokens)
        if piece.finished:
            break
    return shown, tokens


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [("aé漢b", [], "aé漢b"), ("one\n\ntwo", ["\n\n"], "one"), ("half sto", ["stop"], "half sto"), ("né", ["é"], "n")],
)
def test_every_token_of_the_text_shown_is_reported_once(text: str, stops: list[str], shown: str) -> None:
    got, tokens = answer(BYTES, script(text), stops)
    assert got == shown
    assert [token.id for token in tokens] == BYTES.encode(shown)
    assert [token.logprob for token in tokens] == [-float(at) for at in range(len(tokens))]
    starts = [len(bytes(BYTES.encode(shown)[:at]).decode(errors="ignore")) for at in range(len(tokens))]
    assert [token.start for token in tokens] == starts


@pytest.mark.parametrize("spec", ["byte", "gpt2", "mistral", "char"])
def test_the_bytes_of_tokens_make_the_text(spec: str) -> None:
    text = "Hello there,  wörld 漢字 🙂\n<0x0A>"
    tokenizer = Tokenizer.build(spec, [text])
    pieces = [TokenBytes(tokenizer)[id] for id in tokenizer.encode(text)]
    assert b"".join(pieces).decode().removeprefix(" ") == text
    assert TokenBytes(tokenizer)[tokenizer.eos_id] == tokenizer.eos.encode()


def test_rows_of_several_lengths_leave_the_batch_as_they_end() -> None:
    scripts = {"x": "short", "longer prompt": "a much longer answer", "mid": ""}
    model = Reciter({prompt: script(text) for prompt, text in scripts.items()})
    assert generate(model, list(scripts), max_new_tokens=50) == list(scripts.values())  # type: ignore[arg-type]
    assert model.rows_stepped == [3] + [2] * 5 + [1] * 15


def test_one_text_for_a_text_a_list_for_a_list() -> None:
    model: Any = Reciter({"x": script("y")})
    assert generate(model, "x") == "y"
    assert generate(model, ["x"]) == ["y"]
    assert generate(model, "x", stop="y") == ""


def test_generation_leaves_the_mode_of_the_model_as_it_was() -> None:
    model: Any = Reciter({"": script("abc")})
    for training in (True, False):
        model.train(training)
        generate(model, "")
        assert model.training is training
    assert not any(model.modes)


def test_learned_positions_are_counted_before_the_first_token() -> None:
    model: Any = Reciter({"abc": script("x" * 20)}, learned_positions=10)
    with pytest.raises(ConfigError, match=r"10 learned positions.*needs 11; set max_new_tokens to at most 7"):
        generate(model, "abc", max_new_tokens=8)
    assert generate(model, "abc", max_new_tokens=7) == "x" * 7
    with pytest.raises(ConfigError, match="give a shorter prompt"):
        generate(model, "a" * 10, max_new_tokens=1)


def test_logits_that_are_not_finite_are_the_checkpoint_s_fault() -> None:
    model: Any = Reciter({"": [0]})
    model.recite = lambda heard: torch.full((BYTES.vocab_size,), math.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        generate(model, "", temperature=0)


def test_a_model_without_a_tokenizer_says_where_to_get_one() -> None:
    model: Any = Reciter({"": script("x")})
    model.tokenizer = None
    with pytest.raises(DataError, match="tokenizer="):
        generate(model, "")
    assert generate(model, "", tokenizer=BYTES) == "x"


def test_the_defaults_of_generate_are_those_of_the_params() -> None:
    keywords = dict(generate.__kwdefaults__)
    assert keywords.pop("tokenizer") is None
    assert SamplingParams(**keywords) == SamplingParams()


def run_verb(monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str], **settings: Any) -> None:
    model = Reciter({prompt: script(text) for prompt, text in scripts.items()})
    monkeypatch.setattr(verb, "load", lambda *_, **__: model)
    verb.run(GenerateConfig(checkpoint="x", **settings))


@pytest.mark.parametrize("stream", [True, False])
def test_the_verb_prints_the_prompt_and_its_continuation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stream: bool
) -> None:
    run_verb(monkeypatch, {"To be": ", or"}, prompt="To be", stream=stream)
    run_verb(monkeypatch, {"To be": ", or"}, prompt="To be", stream=stream, echo=False)
    assert capsys.readouterr().out == "To be, or\n, or\n"


def test_the_verb_prints_several_samples_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_verb(monkeypatch, {"a": "b"}, prompt="a", num=2)
    assert capsys.readouterr().out == "--- sample 1 of 2 ---\nab\n--- sample 2 of 2 ---\nab\n"


def test_a_later_sample_waits_for_the_earlier(capsys: pytest.CaptureFixture[str]) -> None:
    printer = verb._Printer(GenerateConfig(checkpoint="x", num=2, echo=False), "")
    for row, text, finished in [(0, "a", None), (1, "A", None), (1, "B", "eos"), (0, "b", "length")]:
        printer.push(Event(row, 0, text, 0.0, (), finished))  # type: ignore[arg-type]
    assert capsys.readouterr().out == "--- sample 1 of 2 ---\nab\n--- sample 2 of 2 ---\nAB\n"


def test_the_prompt_comes_from_a_file_or_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("é\r\nb\n".encode())
    run_verb(monkeypatch, {"é\r\nb": "!"}, prompt_file=file, echo=False)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(read=lambda: "from the pipe\n"))
    run_verb(monkeypatch, {"from the pipe": "?"}, prompt="-", echo=False)
    assert capsys.readouterr().out == "!\n?\n"
    file.write_bytes(b"ab\xff")
    with pytest.raises(DataError, match="byte 2 is 0xff"):
        run_verb(monkeypatch, {}, prompt_file=file)
    with pytest.raises(ConfigError, match="both given"):
        GenerateConfig(checkpoint="x", prompt="a", prompt_file=file)
