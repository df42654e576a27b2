"""How much text a token stands for: the bytes and words behind bits per byte and word perplexity."""

import re
from functools import cache

import numpy as np

_WORD = re.compile(r"\S+")


def count_words(text: str) -> int:
    """Words are what white space separates, as for `str.split`, which would hold them all in memory."""
    return sum(1 for _ in _WORD.finditer(text))


def per_token(text: str, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The UTF-8 bytes of each token and the number of words that begin in it.

    A character belongs to the first token that ends behind it, what follows the last token to that one: so the sums
    over all tokens are the bytes and the words of the text, and sums over a part are those of that part.

    Args:
        ends: [n] int64, for each token the character of the text after its last one.
    Returns:
        two uint32 arrays [n].
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    num_bytes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    space = np.isin(codes, _white_space())
    begins = ~space & np.concatenate([[True], space[:-1]]) if len(codes) else space
    borders = np.maximum.accumulate(ends)
    if len(borders):
        borders[-1] = len(codes)
    return _sums(num_bytes, borders), _sums(begins, borders)


def _sums(values: np.ndarray, borders: np.ndarray) -> np.ndarray:
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.diff(running[borders], prepend=0).astype(np.uint32)


@cache
def _white_space() -> np.ndarray:
    return np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)
