"""How much a text repeats itself, in words: measures of the text alone, so that any two models can be compared.

    rep-n       1 - distinct n-grams / n-grams, of one text             (0: none repeats)
    diversity   product of 1 - rep-n for n = 2, 3, 4                    (1: nothing repeats)
    distinct-n  distinct n-grams / n-grams, of all texts together       (of one model's samples: how alike they are)

Words are runs of letters and digits (and apostrophes within), in lower case; punctuation counts for nothing.
Sources: Welleck et al. arXiv:1908.04319 (rep-n), Su et al. arXiv:2202.06417 (diversity), Li et al. arXiv:1510.03055
(distinct-n).
"""

import re
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"\w+(?:['’]\w+)*")


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


def repeats(text: str, n: int = 3) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether its words are part of an n-gram that occurred before; joined, the text."""
    found = list(_WORD.finditer(text))
    grams = _grams([match[0].lower() for match in found], n)
    seen: set[tuple[str, ...]] = set()
    repeated = [False] * len(found)
    for i, gram in enumerate(grams):
        if gram in seen:
            repeated[i : i + n] = [True] * n
        seen.add(gram)
    pieces: list[tuple[str, bool]] = []
    start = 0
    for i, match in enumerate(found):
        # what stands between two repeated words belongs to the repetition
        joins = i > 0 and repeated[i] and repeated[i - 1]
        pieces += [(text[start : match.start()], joins), (match[0], repeated[i])]
        start = match.end()
    return [(piece, flag) for piece, flag in [*pieces, (text[start:], False)] if piece]
