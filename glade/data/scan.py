"""The first reading of a corpus: its hash, its characters, and which document goes into which split."""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from glade.data.corpus import Document, Source
from glade.data.split import split_documents
from glade.errors import DataError

Read = Callable[[str], Iterator[Document]]


class Fate(IntEnum):
    """What becomes of a document of the corpus."""

    TRAIN = 0
    HELDOUT = 1
    DIVIDED = 2  # its end is held out
    LEFT_OUT = 3  # equal to a held-out document


@dataclass
class Scan:
    """What the first reading finds.

    sources       (source, first document, end)
    digests       uint64 [documents], of each text; sizes int64 [documents], its UTF-8 bytes
    characters    all that occur, in the corpus and in the held-out corpus
    sha256        of all texts in order, and of which source they belong to
    """

    sources: list[tuple[Source, int, int]]
    digests: np.ndarray
    sizes: np.ndarray
    heldout_digests: np.ndarray
    characters: set[str]
    sha256: str

    @property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())


@dataclass
class Plan:
    """Where every document goes: `fates` [documents], `shares` of the divided ones, and notes for the user."""

    fates: np.ndarray
    shares: dict[int, float]
    notes: list[str]


def digest(text: str) -> int:
    """64 bits of the sha256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def scan(sources: list[Source], heldout_corpus: list[Source], read: Read, advance: Callable[[int], None]) -> Scan:
    """Reads the sources once, then the held-out corpus.

    Args:
        read: the documents of one source.
        advance: told the bytes of each document, for a progress display.
    Raises:
        DataError: a source that cannot be read, or without a document.
    """
    digests, sizes, held = array("Q"), array("q"), array("Q")
    characters: set[str] = set()
    whole = hashlib.sha256()
    ranges: list[tuple[Source, int, int]] = []

    def add(source: Source, digests: array) -> None:
        num = len(digests)
        for document in read(source.spec):
            try:
                data = document.text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{document.name}: a lone surrogate at character {error.start}; remove it") from error
            code = hashlib.sha256(data).digest()
            whole.update(code)
            digests.append(int.from_bytes(code[:8], "little"))
            sizes.append(len(data))
            characters.update(document.text)
            advance(len(data))
        if len(digests) == num:
            raise DataError(f"corpus {source.spec!r} is empty: no document in it holds any text")
        whole.update(f"{len(digests)} {source.weight}".encode())

    for source in sources:
        first = len(digests)
        add(source, digests)
        ranges.append((source, first, len(digests)))
    num = len(digests)
    for source in heldout_corpus:
        add(source, held)
    return Scan(
        sources=ranges,
        digests=np.array(digests, np.uint64),
        sizes=np.array(sizes[:num], np.int64),
        heldout_digests=np.array(held, np.uint64),
        characters=characters,
        sha256=whole.hexdigest(),
    )


def plan(found: Scan, share: float, seed: int) -> Plan:
    """Splits each source on its documents; none that equals a held-out one stays in training.

    Args:
        share: of the bytes of each source, to hold out; not used where a held-out corpus was read.
    Raises:
        DataError: nothing would be left to train on.
    """
    fates = np.full(len(found.sizes), Fate.TRAIN, np.uint8)
    shares: dict[int, float] = {}
    notes: list[str] = []
    kept_away = found.heldout_digests
    if not len(kept_away):
        for number, (source, first, end) in enumerate(found.sources):
            split = split_documents(found.sizes[first:end], share, seed + number)
            fates[first:end][split.held] = Fate.HELDOUT
            if split.divided is not None:
                fates[first + split.divided] = Fate.DIVIDED
                shares[first + split.divided] = split.share
                which = "it" if end - first == 1 else f"the longest of its {end - first} documents"
                notes.append(
                    f"corpus {source.spec!r} has no whole documents of a size to hold out: "
                    f"the last {split.share:.1%} of {which} is held out"
                )
        kept_away = found.digests[(fates == Fate.HELDOUT) | (fates == Fate.DIVIDED)]
    copies = np.isin(found.digests, kept_away) & (fates == Fate.TRAIN)
    fates[copies] = Fate.LEFT_OUT
    if copies.any():
        notes.append(f"{copies.sum()} documents equal to a held-out one are left out of training")
    if not np.isin(fates, (Fate.TRAIN, Fate.DIVIDED)).any():
        raise DataError("every document of the corpus is held out too, so none is left to train on; lower heldout")
    return Plan(fates, shares, notes)
