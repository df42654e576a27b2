"""How much a text repeats itself, in words: measures of the text alone, so that any two models can be compared.

    rep-n       1 - distinct n-grams / n-grams, of one text             (0: none repeats)
    diversity   product of 1 - rep-n for n = 2, 3, 4                    (1: nothing repeats)
    distinct-n  distinct n-grams / n-grams, of all texts together       (of one model's samples: how alike they are)

Words are runs of letters and digits, in lower case; any other character but white space is a word of its own.
Sources: Welleck et al. arXiv:1908.04319 (rep-n), Su et al. arXiv:2202.06417 (diversity), Li et al. arXiv:1510.03055
(distinct-n).
"""

import re
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text.lower())


def rep_n(text: str, n: int) -> float:
    """The share of the text's n-grams that occurred in it before; 0 for a text of fewer than n words."""
    grams = _grams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def diversity(text: str) -> float:
    """The product of 1 - rep-n for n = 2, 3, 4."""
    product = 1.0
    for n in (2, 3, 4):
        product *= 1 - rep_n(text, n)
    return product


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct n-grams over all n-grams of all texts; 0 where there are none."""
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
