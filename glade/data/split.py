"""Which documents are held out: a pure function of the documents and the seed, decided before anything else is."""

from typing import NamedTuple

import numpy as np

from glade.data.order import permutation

# how far the held-out share may be from the one asked for before a document is split instead
_TOLERANCE = 0.5
# a document is split at the paragraph border nearest to its place, if one is this near (part of the whole text)
_REACH = 0.1


class Split(NamedTuple):
    """`held` bool [documents]; `divided`: the document whose last `share` is held out and whose rest is not, if any."""

    held: np.ndarray
    divided: int | None
    share: float


def split_documents(sizes: np.ndarray, share: float, seed: int) -> Split:
    """Holds out whole documents, chosen by the seed, that make up about this share of the bytes.

    Where whole documents cannot come within half of that (one long document, or a few), the longest is divided.

    Args:
        sizes: int64 [documents], in bytes.
        share: of the bytes, 0 <= share < 1.
    """
    held = np.zeros(len(sizes), bool)
    wanted = share * sizes.sum()
    if wanted == 0:
        return Split(held, None, 0.0)
    order = permutation(len(sizes), seed, "heldout")
    order = order[sizes[order] <= wanted * (1 + _TOLERANCE)]
    sums = np.concatenate([[0], np.cumsum(sizes[order])])
    count = int(np.argmin(np.abs(sums - wanted)))
    if abs(sums[count] - wanted) <= _TOLERANCE * wanted and count < len(sizes):
        held[order[:count]] = True
        return Split(held, None, 0.0)
    longest = int(np.argmax(sizes))
    return Split(held, longest, float(wanted / sizes[longest]))


def divide(text: str, share: float) -> tuple[str, str]:
    """A text as its head and about the last `share` of it, cut where a paragraph, a line or a word ends."""
    cut = round(len(text) * (1 - share))
    reach = max(1, int(len(text) * _REACH * min(share, 1 - share)))
    for border in ("\n\n", "\n", " "):
        before = text.rfind(border, max(0, cut - reach), cut) + len(border)
        after = text.find(border, cut, cut + reach) + len(border)
        places = [p for p in (before, after) if p >= len(border) and 0 < p < len(text)]
        if places:
            cut = min(places, key=lambda p: abs(p - cut))
            break
    return text[:cut], text[cut:]
