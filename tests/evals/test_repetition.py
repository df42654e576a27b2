"""Measures of repetition, counted by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glade.evals.repetition import distinct_n, diversity, rep_n, repeats, words


def test_words() -> None:
    assert words('"Don\'t!" said Zoë — twice, TWICE.') == ["don't", "said", "zoë", "twice", "twice"]


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("a b c d", 1, 0.0),
        ("a a a a", 1, 0.75),
        ("the dog the dog the cat", 2, 1 - 3 / 5),  # the-dog dog-the the-dog dog-the the-cat
        ("The dog, the DOG", 2, 1 - 2 / 3),
        ("too short", 3, 0.0),
        ("", 1, 0.0),
    ],
)
def test_rep_n(text: str, n: int, expected: float) -> None:
    assert rep_n(text, n) == pytest.approx(expected)


def test_diversity() -> None:
    text = "a b a b a b a b"  # 7 pairs of 2 kinds, 6 triples of 2, 5 quadruples of 2
    assert diversity(text) == pytest.approx(2 / 7 * 2 / 6 * 2 / 5)
    assert diversity("nothing here repeats itself at all") == 1


def test_distinct_n_is_of_all_texts_together() -> None:
    assert distinct_n(["a b", "a b"], 1) == 0.5
    assert distinct_n(["a b", "b a"], 2) == 1
    assert distinct_n(["a", ""], 2) == 0


def test_repeats_marks_later_occurrences() -> None:
    text = "He ran home. Then, he ran home fast."
    assert [piece for piece, again in repeats(text) if again] == ["he", " ", "ran", " ", "home"]


@given(st.text("ab .,\n'", max_size=60))
def test_repeats_joined_are_the_text(text: str) -> None:
    assert "".join(piece for piece, _ in repeats(text)) == text
