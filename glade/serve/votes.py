"""Blind votes of people between two models: what is shown, what is hidden until the vote, and the file they end in.

A line of the file is what `glade.evals.votes` describes, and preference data for `glade dpo` as it is.
"""

import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glade.errors import DataError

Verdict = Literal["left", "right", "tie"]


@dataclass(frozen=True)
class Ballot:
    """Two answers to one prompt, in an order that chance decided; `models` says whose they are, left one first."""

    prompt: str | list[dict[str, str]]
    answers: tuple[str, str]
    models: tuple[str, str]
    settings: Mapping[str, Any]  # how the answers were drawn

    def row(self, verdict: Verdict) -> dict[str, Any]:
        """The vote as a line of the file; of a tie the left answer is called chosen, which says nothing."""
        chosen = 1 if verdict == "right" else 0
        return {
            "prompt": self.prompt,
            "chosen": self.answers[chosen],
            "rejected": self.answers[1 - chosen],
            "model_chosen": self.models[chosen],
            "model_rejected": self.models[1 - chosen],
            "tie": verdict == "tie",
            "time": round(time.time()),
            "sampling": dict(self.settings),
        }


def shuffled(first: str, second: str) -> tuple[str, str]:
    """Two names in an order that nobody can foresee."""
    return (first, second) if secrets.randbits(1) else (second, first)


class VoteBox:
    """The file of votes; votes are added at its end, a line each, from any thread.

    Raises:
        DataError: a file of something else is there already.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._tallies: Counter[tuple[str, str]] = Counter()
        self._ties: Counter[frozenset[str]] = Counter()
        for number, line in enumerate(self.read().splitlines(), 1):
            try:
                self._count(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: no vote ({error!r}); name another file with --serve.votes"
                ) from error

    def add(self, ballot: Ballot, verdict: Verdict) -> None:
        row = ballot.row(verdict)
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
            self._count(row)

    def read(self) -> str:
        """The whole file."""
        return self.path.read_text(encoding="utf-8") if self.path.exists() else ""

    def tally(self, first: str, second: str) -> tuple[int, int, int]:
        """Votes for the first model against the second, for the second, and ties."""
        return self._tallies[first, second], self._tallies[second, first], self._ties[frozenset((first, second))]

    def _count(self, row: Mapping[str, Any]) -> None:
        pair = (str(row["model_chosen"]), str(row["model_rejected"]))
        if row["tie"]:
            self._ties[frozenset(pair)] += 1
        else:
            self._tallies[pair] += 1
