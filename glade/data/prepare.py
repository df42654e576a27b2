"""Text to token shards, once: split on documents, build the vocabulary, encode, write a folder to train from.

The corpus is read twice: to measure, hash and split it, and to encode it (three times with a "bpe:NUM" tokenizer, which
is trained in between). At no time is more than one document, or a batch of short ones, in memory.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glade.data.corpus import Document, Source, credits, parse_mixture, source_documents
from glade.data.files import read_json, sync, write_text
from glade.data.measure import count_words, per_token
from glade.data.prepared import FORMAT, INDEX, TOKENIZER, Prepared, dtype_for, is_prepared
from glade.data.progress import bytes_bar
from glade.data.scan import Fate, Plan, Scan, digest, plan, scan
from glade.data.split import divide
from glade.data.store import SplitWriter
from glade.data.tokenizer import Tokenizer
from glade.data.vocabularies import char_tokenizer
from glade.errors import ConfigError, DataError

# short documents are encoded together, up to this much text at a time
_BATCH_CHARS = 1 << 20


def prepare(
    spec: str,
    folder: str | Path,
    *,
    tokenizer: str | Tokenizer = "char",
    text_field: str = "text",
    separator: str | None = None,
    heldout: float = 0.05,
    heldout_corpus: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Prepared:
    """Makes a folder of token shards, or finds it made: with the same corpus and settings nothing is done again.

    The split comes first, on whole documents chosen by `seed`; where whole documents cannot make up the share (one
    long text), the end of the longest is held out. Documents equal to a held-out one are left out of training. A
    "bpe:NUM" tokenizer is trained on the training split alone. A "char" tokenizer holds the characters of the whole
    corpus, the held-out part too, which could not be encoded otherwise.

    Args:
        spec: the corpus, see `glade.data.corpus.corpus`. Weighted sources stay apart for `Batches` to mix.
        folder: written under another name and renamed when it is complete and on the disk.
        tokenizer: a spec, see `glade.data.vocabularies.build`, or a tokenizer.
        text_field, separator: see `glade.data.readers.read_file`.
        heldout: share of the corpus (by bytes, of each source) to hold out; not used with a `heldout_corpus`.
        heldout_corpus: a corpus of its own to hold out, and none of `spec`.
        overwrite: replace a folder that was prepared from something else.
        progress: show bars, if stderr is a terminal.
    Raises:
        ConfigError: `heldout` is no share.
        DataError: the corpus or tokenizer cannot be used, or the folder holds something else.
    """
    job = _Job(spec, tokenizer, text_field, separator, heldout, heldout_corpus, seed, progress)
    return job.run(Path(folder).expanduser(), overwrite)


def prepare_cached(
    spec: str,
    *,
    tokenizer: str | Tokenizer = "char",
    text_field: str = "text",
    separator: str | None = None,
    heldout: float = 0.05,
    heldout_corpus: str | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Prepared:
    """`prepare` into a folder of the cache that is named by the hash of the corpus and the settings.

    Args:
        spec: a corpus, or a prepared folder, which is opened as it is; settings that are given beside it and are not
            those it was made with are an error.
        cache: None is $GLADE_CACHE, else ~/.cache/glade.
    """
    job = _Job(spec, tokenizer, text_field, separator, heldout, heldout_corpus, seed, progress)
    if is_prepared(spec):
        return job.open_as_made(Prepared.open(spec))
    root = Path(cache or os.environ.get("GLADE_CACHE") or "~/.cache/glade").expanduser()
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(spec).name if "+" not in spec else spec).strip("-")[:40]
    return job.run(lambda key: root / f"{name}-{key[:16]}", overwrite=False)


@dataclass(frozen=True)
class _Job:
    """The arguments of `prepare`, and its steps."""

    corpus: str
    tokenizer: str | Tokenizer
    text_field: str
    separator: str | None
    heldout: float
    heldout_corpus: str | None
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        if not 0 <= self.heldout < 1:
            raise ConfigError(f"heldout is {self.heldout}; it is a share of the corpus, 0 <= heldout < 1")

    def run(self, folder: Path | Callable[[str], Path], overwrite: bool) -> Prepared:
        """Scans, and writes the folder unless it is there already; `folder` may depend on the key."""
        # a tokenizer that is wrong is better found before the corpus is read
        given = None if self._from_corpus else self._given_tokenizer()
        with bytes_bar("reading", None, self.progress) as advance:
            found = scan(parse_mixture(self.corpus), self._heldout_sources(), self._read, advance)
        key = self._key(found, given)
        path = folder if isinstance(folder, Path) else folder(key)
        if is_prepared(path):
            info = read_json(path / INDEX)
            if info["key"] == key:
                return Prepared.open(path)
            if not overwrite:
                raise DataError(
                    f"{path}: prepared from {info['settings']['corpus']!r}, with other text or other settings; "
                    f"choose another folder, or overwrite it"
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise DataError(f"{path}: holds something that is no prepared data; choose another folder")
        where = plan(found, self.heldout, self.seed)
        for note in where.notes:
            print(f"glade: {note}", file=sys.stderr)
        try:
            self._write(path, key, found, where, given or self._make_tokenizer(found, where))
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error.strerror}); free space, or choose another place"
            ) from error
        return Prepared.open(path)

    # --- what the key, the settings and the tokenizer are ---

    @property
    def _from_corpus(self) -> bool:
        return isinstance(self.tokenizer, str) and (self.tokenizer == "char" or self.tokenizer.startswith("bpe:"))

    def _given_tokenizer(self) -> Tokenizer:
        return Tokenizer.build(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer

    def _make_tokenizer(self, found: Scan, where: Plan) -> Tokenizer:
        if self.tokenizer == "char":
            return char_tokenizer(found.characters)
        assert isinstance(self.tokenizer, str)
        with bytes_bar("training the tokenizer", int(found.sizes.sum()), self.progress) as advance:
            parts = self._parts(found, where, advance)
            return Tokenizer.build(self.tokenizer, (text for fate, text in parts if fate is Fate.TRAIN))

    def _settings(self) -> dict[str, Any]:
        """What was asked for, as prepared.json keeps it."""
        name = self.tokenizer if isinstance(self.tokenizer, str) else f"sha256:{self.tokenizer.digest()}"
        return {
            "corpus": self.corpus,
            "tokenizer": name,
            "text_field": self.text_field,
            "separator": self.separator,
            "heldout": self.heldout,
            "heldout_corpus": self.heldout_corpus,
            "seed": self.seed,
        }

    def _key(self, found: Scan, given: Tokenizer | None) -> str:
        """The hash of all that decides what is written: the texts rather than their paths."""
        tokenizer = self.tokenizer if given is None else given.digest()
        share = self.heldout if self.heldout_corpus is None else "corpus"
        return hashlib.sha256(json.dumps([FORMAT, found.sha256, tokenizer, share, self.seed]).encode()).hexdigest()

    def open_as_made(self, made: Prepared) -> Prepared:
        """A prepared folder, if what is asked for beside it is what it was made with, or left at its default."""
        asked, was = self._settings(), made.info["settings"]
        default = {
            "tokenizer": "char",
            "text_field": "text",
            "separator": None,
            "heldout": 0.05,
            "heldout_corpus": None,
        }
        for name, value in default.items():
            if asked[name] not in (value, was[name]):
                raise DataError(
                    f"{made.folder}: was prepared with {name}={was[name]!r}, not {asked[name]!r}; "
                    f"leave that setting out, or prepare the corpus again with it"
                )
        return made

    # --- reading ---

    def _read(self, spec: str) -> Iterator[Document]:
        return source_documents(spec, text_field=self.text_field, separator=self.separator)

    def _heldout_sources(self) -> list[Source]:
        return parse_mixture(self.heldout_corpus) if self.heldout_corpus else []

    def _parts(self, found: Scan, where: Plan, advance: Callable[[int], None]) -> Iterator[tuple[Fate, str]]:
        """The second reading: (TRAIN or HELDOUT, text), those of the corpus first."""
        number = -1
        for source, _, end in found.sources:
            for document in self._read(source.spec):
                number += 1
                if number >= end or digest(document.text) != found.digests[number]:
                    raise DataError(f"{document.name}: changed while it was being read; prepare again")
                advance(int(found.sizes[number]))
                fate = Fate(where.fates[number])
                if fate is Fate.DIVIDED:
                    head, tail = divide(document.text, where.shares[number])
                    if not head.strip() or not tail.strip():
                        raise DataError(f"{document.name}: too short to hold a part out; set heldout=0")
                    yield Fate.TRAIN, head
                    yield Fate.HELDOUT, tail
                elif fate is not Fate.LEFT_OUT:
                    yield fate, document.text
        for source in self._heldout_sources():
            for document in self._read(source.spec):
                yield Fate.HELDOUT, document.text

    # --- writing ---

    def _write(self, path: Path, key: str, found: Scan, where: Plan, tokenizer: Tokenizer) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            dtype = dtype_for(tokenizer.vocab_size)
            train = SplitWriter(unfinished, "train", dtype, measured=False)
            heldout = SplitWriter(unfinished, "heldout", dtype, measured=True)
            with bytes_bar("encoding", int(found.sizes.sum()), self.progress) as advance:
                _encode(self._parts(found, where, advance), tokenizer, train, heldout)
            tokenizer.save(unfinished / TOKENIZER)
            info = {
                "format": FORMAT,
                "key": key,
                "content_sha256": found.sha256,
                "settings": self._settings(),
                "vocab_size": tokenizer.vocab_size,
                "dtype": dtype,
                "sources": _sources(found, where),
                "splits": {"train": train.finish(), "heldout": heldout.finish()},
                "files": train.files | heldout.files,
                "notes": where.notes,
                "credits": credits([source.spec for source, _, _ in found.sources]),
            }
            write_text(unfinished / INDEX, json.dumps(info, indent=2, ensure_ascii=False) + "\n")
            # another process may have made the same folder meanwhile, and be reading it already
            if not (is_prepared(path) and read_json(path / INDEX)["key"] == key):
                _move(unfinished, path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _sources(found: Scan, where: Plan) -> list[dict[str, Any]]:
    """Each source, its weight, and its range of training documents."""
    trained = np.concatenate([[0], np.cumsum(np.isin(where.fates, (Fate.TRAIN, Fate.DIVIDED)))])
    return [
        {
            "corpus": source.spec,
            "weight": None if source.weight is None else str(source.weight),
            "documents": [int(trained[first]), int(trained[end])],
        }
        for source, first, end in found.sources
    ]


def _encode(parts: Iterator[tuple[Fate, str]], tokenizer: Tokenizer, train: SplitWriter, heldout: SplitWriter) -> None:
    """Writes every text into its split, as a document; training texts are encoded many at a time."""
    waiting: list[str] = []
    chars = 0

    def flush() -> None:
        for text, ids in zip(waiting, tokenizer.encode_batch(waiting), strict=True):
            train.add(_document(ids, tokenizer), len(text.encode()), count_words(text))
        waiting.clear()

    for fate, text in parts:
        if fate is Fate.TRAIN:
            waiting.append(text)
            chars += len(text)
            if chars >= _BATCH_CHARS:
                flush()
                chars = 0
        else:
            ids, ends = tokenizer.encode_with_ends(text)
            sizes = [np.concatenate([[0], values, [0]]) for values in per_token(text, ends)]
            heldout.add(_document(ids, tokenizer), len(text.encode()), count_words(text), (sizes[0], sizes[1]))
    flush()


def _document(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """`Tokenizer.document`, for ids that are an array."""
    return np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]], dtype=np.int32)


def _move(unfinished: Path, path: Path) -> None:
    """Puts the finished folder in its place in one step; an older one there is taken away after that."""
    _sync_folder(unfinished)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    try:
        unfinished.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk; only POSIX systems can be asked to."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)
