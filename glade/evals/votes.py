"""Votes of people between the answers of two models: one JSON object a line.

    {"prompt": "...", "chosen": "...", "rejected": "...", "model_chosen": "a", "model_rejected": "b", "tie": false}

`prompt` is a text or a list of messages, as in preference data; "tie" may be left out, and is then false. Of a tie it
does not matter which answer is called chosen. Rows that are no ties are preference data for `glade dpo` as they are; it
refuses (or, with data.bad_rows=drop, drops) ties. Other keys, such as a time, are kept by whoever writes them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glade.data.preference import TextPair, parse_sides
from glade.data.rows import BadRow, parse_rows, text_at
from glade.errors import DataError


class Vote(NamedTuple):
    """One comparison that somebody judged."""

    pair: TextPair
    model_chosen: str
    model_rejected: str
    tie: bool


class Tally(NamedTuple):
    """How often the second of two models was preferred, how often the first, and how often neither."""

    wins: int
    losses: int
    ties: int

    @property
    def num(self) -> int:
        return self.wins + self.losses + self.ties

    @property
    def win_rate(self) -> float:
        """Wins, a tie counting half, over all comparisons."""
        return (self.wins + self.ties / 2) / self.num

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the win rate, as Wilson's of a share. Source: Wilson 1927."""
        z, n, p = 1.959964, self.num, self.win_rate
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
        return middle - half, middle + half

    def to_dict(self) -> dict[str, Any]:
        return {"win_rate": self.win_rate, "interval": list(self.interval()), **self._asdict()}


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file.

    Raises:
        DataError: rows that are no votes, all of them told with their lines.
    """
    return parse_rows(path, parse_vote, too_long="error", bad_rows="error")


def parse_vote(row: dict[str, Any]) -> Vote:
    """One row.

    Raises:
        BadRow: a key that is missing or of a wrong type, or two names that are the same model.
    """
    tie = row.get("tie", False)
    if not isinstance(tie, bool):
        raise BadRow("'tie' is neither true nor false")
    vote = Vote(parse_sides(row), text_at(row, "model_chosen"), text_at(row, "model_rejected"), tie)
    if vote.model_chosen == vote.model_rejected:
        raise BadRow(f"'model_chosen' and 'model_rejected' are both {vote.model_chosen!r}")
    return vote


def tally(votes: Sequence[Vote], base: str, aligned: str) -> Tally:
    """The votes between two models, told apart by their names; votes on other models are left out.

    Raises:
        DataError: no vote is between these two.
    """
    between = [vote for vote in votes if {vote.model_chosen, vote.model_rejected} == {base, aligned}]
    if not between:
        names = sorted({name for vote in votes for name in (vote.model_chosen, vote.model_rejected)})
        raise DataError(f"no vote is between {base!r} and {aligned!r}; the votes are on {', '.join(map(repr, names))}")
    ties = sum(vote.tie for vote in between)
    wins = sum(not vote.tie and vote.model_chosen == aligned for vote in between)
    return Tally(wins, len(between) - wins - ties, ties)
