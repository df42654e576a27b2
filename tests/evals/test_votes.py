"""Votes: read, counted, and preference data where they are no ties."""

import json
from pathlib import Path
from typing import Any

import pytest

from glade.data.preference import read_pairs
from glade.data.tokenizer import Tokenizer
from glade.errors import DataError
from glade.evals.votes import Tally, read_votes, tally

VOTE = {"prompt": "p", "chosen": "x", "rejected": "y", "model_chosen": "new", "model_rejected": "old", "time": 1}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_votes_are_counted_and_train(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lost = VOTE | {"model_chosen": "old", "model_rejected": "new"}
    other = VOTE | {"model_chosen": "third"}
    equal = VOTE | {"tie": True, "chosen": "same", "rejected": "same"}
    path = written(tmp_path / "votes.jsonl", VOTE, VOTE | {"tie": False}, lost, equal, other)
    votes = read_votes(path)
    assert tally(votes, "old", "new") == Tally(2, 1, 1)
    assert tally(votes, "new", "old") == Tally(1, 2, 1)
    assert tally(votes, "old", "third") == Tally(1, 0, 0)
    with pytest.raises(DataError, match="the votes are on 'new', 'old', 'third'"):
        tally(votes, "old", "else")
    byte = Tokenizer.build("byte")
    with pytest.raises(DataError, match=r":4: a tie"):
        read_pairs(path, byte)
    assert len(read_pairs(path, byte, bad_rows="drop")) == 4


def test_win_rate_and_interval() -> None:
    assert Tally(6, 2, 2).win_rate == 0.7
    # Wilson's interval of 7 in 10, from a table
    assert Tally(7, 3, 0).interval() == (pytest.approx(0.3968, abs=1e-4), pytest.approx(0.8922, abs=1e-4))
    low, high = Tally(0, 5, 0).interval()
    assert low == pytest.approx(0, abs=1e-12) and 0.3 < high < 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tie": "yes"}, "neither true nor false"),
        ({"model_rejected": "new"}, "are both 'new'"),
        ({"model_chosen": 1}, "'model_chosen' is a number"),
        ({"chosen": 1}, "'chosen' is a number"),
    ],
)
def test_bad_votes(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"votes.jsonl:2: .*{said}"):
        read_votes(written(tmp_path / "votes.jsonl", VOTE, VOTE | change))
