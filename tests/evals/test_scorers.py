"""What ranks answers: repetition, another checkpoint, a function of the user's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from glade.errors import ConfigError, DataError
from glade.evals.scorers import make_scorer
from glade.infer.score import score_ids
from glade.interop.load import load

MakeCheckpoint = Callable[..., str]


def test_repetition() -> None:
    score = make_scorer("repetition")
    assert score(["p", "p"], ["one two three", "a a a a a a"]) == [1.0, pytest.approx(1 / 5 * 1 / 4 * 1 / 3)]


def test_logprob_under_a_judge(make_checkpoint: MakeCheckpoint) -> None:
    judge = make_checkpoint("judge", 3)
    score = make_scorer("logprob", judge, "cpu")
    model = load(judge)
    t = model.tokenizer
    expected = []
    for prompt, answer in (("Once", " upon"), ("One", "s"), ("", "alone")):
        ids = [*t.prompt(prompt), *t.encode(answer), t.eos_id]
        expected.append(score_ids(model, ids)[0][len(t.prompt(prompt)) - 1 :].mean().item())
    assert score(["Once", "One", ""], [" upon", "s", "alone"]) == pytest.approx(expected, abs=1e-5)


def test_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my_taste.py"
    file.write_text(
        "def length(prompt, answer):\n    return len(prompt) + len(answer)\n"
        "def nothing(prompt, answer):\n    return None\n"
        "def nan(prompt, answer):\n    return float('nan')\nnumber = 3\n"
    )
    assert make_scorer(f"{file}:length")(["ab", "c"], ["d", "ef"]) == [3.0, 3.0]
    monkeypatch.syspath_prepend(str(tmp_path))
    assert make_scorer("my_taste:length")(["ab"], ["d"]) == [3.0]
    for name, said in (("nothing", "gave None"), ("nan", "gave nan")):
        with pytest.raises(DataError, match=said):
            make_scorer(f"{file}:{name}")(["a"], ["b"])
    for name, said in (
        (f"{file}:number", "has no function 'number'"),
        (f"{tmp_path}/none.py:f", "there is no file"),
        ("no_such_module_here:f", "No module named"),
        ("beauty", "unknown scorer 'beauty'; give repetition, logprob"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_scorer(name)


def test_a_judge_belongs_to_logprob() -> None:
    with pytest.raises(ConfigError, match="needs judge"):
        make_scorer("logprob")
    with pytest.raises(ConfigError, match="belongs to scorer=logprob"):
        make_scorer("repetition", "runs/x")
