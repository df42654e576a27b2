"""Token shards on disk: written once as flat arrays, then memory-mapped.

A split is one or more shards; a document never spans two. `train-00000` is these files, all little-endian:

    .bin          uint16 (uint32 where the vocabulary needs it) tokens, documents end to end
    .idx          int64 [documents + 1]  where each document begins, and the end
    .bytes .words int64 [documents]      UTF-8 bytes and white-space separated words of each document's text
    .token_bytes .token_words  uint32, one a token, in the held-out split alone: for sums over a part of a document
"""

import hashlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from glade.data.files import sync
from glade.errors import DataError

SHARD_TOKENS = 1 << 28
# an empty file cannot be memory-mapped, so a split without a token has no shard at all


@dataclass(frozen=True)
class _Shard:
    base: int  # how many tokens of the split stand before this shard
    tokens: np.ndarray
    token_bytes: np.ndarray | None
    token_words: np.ndarray | None


class TokenStore:
    """The documents of a split, each [BOS] ids [EOS]; the arrays are memory-mapped and read-only.

    Attributes:
        starts: int64 [documents + 1], where each document's tokens begin, counted over the whole split
        bytes, words: int64 [documents], of each document's text (`num_bytes` and `num_words` are their sums)
    """

    def __init__(self, shards: list[_Shard], starts: np.ndarray, bytes: np.ndarray, words: np.ndarray) -> None:
        assert len(starts) == len(bytes) + 1 == len(words) + 1
        self._shards = shards
        self._bases = np.array([shard.base for shard in shards], np.int64)
        self.starts, self.bytes, self.words = starts, bytes, words

    @property
    def num_documents(self) -> int:
        return len(self.bytes)

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1] - self.starts[0])

    @property
    def num_pairs(self) -> int:
        """(input, target) pairs: one less than the tokens of each document."""
        return self.num_tokens - self.num_documents

    @property
    def num_bytes(self) -> int:
        return int(self.bytes.sum())

    @property
    def num_words(self) -> int:
        return int(self.words.sum())

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, BOS and EOS with them."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.tokens(int(self.starts[index]), int(self.starts[index + 1] - self.starts[index]))

    def tokens(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from `start` on (counted like `starts`), within one document."""
        shard = self._shard(start)
        return shard.tokens[start - shard.base : start - shard.base + length]

    def text_sizes(self, start: int, length: int) -> tuple[int, int] | None:
        """The bytes and words that these tokens stand for; None in a split that is not measured token by token."""
        shard = self._shard(start)
        if shard.token_bytes is None or shard.token_words is None:
            return None
        part = slice(start - shard.base, start - shard.base + length)
        return int(shard.token_bytes[part].sum(dtype=np.int64)), int(shard.token_words[part].sum(dtype=np.int64))

    def slice(self, first: int, end: int) -> "TokenStore":
        """The documents first : end, as a store of their own over the same memory."""
        part = slice(first, end)
        return TokenStore(self._shards, self.starts[first : end + 1], self.bytes[part], self.words[part])

    def _shard(self, start: int) -> _Shard:
        return self._shards[int(np.searchsorted(self._bases, start, side="right")) - 1]

    @classmethod
    def open(cls, folder: Path, names: list[str], dtype: str) -> "TokenStore":
        """Maps the shards of these names.

        Raises:
            DataError: a file is missing, or its size or offsets do not fit the others.
        """
        shards: list[_Shard] = []
        starts, sizes, words = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        base = 0
        for name in names:
            offsets = _map(folder / f"{name}.idx", "<i8")
            tokens = _map(folder / f"{name}.bin", dtype)
            if offsets[0] != 0 or np.any(np.diff(offsets) < 2) or offsets[-1] != len(tokens):
                raise _damaged(folder / f"{name}.idx", f"its offsets do not fit the {len(tokens)} tokens of {name}.bin")
            measured = (folder / f"{name}.token_bytes").is_file()
            columns = [
                _map(folder / f"{name}.{c}", "<u4") if measured else None for c in ("token_bytes", "token_words")
            ]
            shards.append(_Shard(base, tokens, *columns))
            starts.append(offsets[1:] + base)
            sizes.append(_map(folder / f"{name}.bytes", "<i8"))
            words.append(_map(folder / f"{name}.words", "<i8"))
            for column, rows in (
                (sizes[-1], len(offsets) - 1),
                (words[-1], len(offsets) - 1),
                *_pairs(columns, tokens),
            ):
                if len(column) != rows:
                    raise _damaged(folder / name, f"one of its files holds {len(column)} entries, not {rows}")
            base += len(tokens)
        return cls(shards, np.concatenate(starts), np.concatenate(sizes), np.concatenate(words))


def _pairs(columns: list[np.ndarray | None], tokens: np.ndarray) -> list[tuple[np.ndarray, int]]:
    return [(column, len(tokens)) for column in columns if column is not None]


def _map(path: Path, dtype: str) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size == 0 or size % np.dtype(dtype).itemsize:
            raise _damaged(path, f"{size} bytes are not a whole number of {dtype} entries")
        return np.memmap(path, dtype, mode="r")
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from error


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: {why}; the prepared folder is damaged: delete it and prepare it again")


class SplitWriter:
    """Appends documents to the shards of one split.

    Args:
        dtype: "<u2" or "<u4".
        measured: whether every document comes with its bytes and words token by token.
    """

    def __init__(self, folder: Path, split: str, dtype: str, *, measured: bool) -> None:
        self._folder, self._split, self._dtype, self._measured = folder, split, dtype, measured
        self._tokens: _HashedFile | None = None
        self._columns: dict[str, _HashedFile] = {}
        self.shards: list[str] = []
        self.files: dict[str, dict[str, Any]] = {}
        self.num_documents = self.num_tokens = self.num_bytes = self.num_words = 0

    def add(
        self, ids: np.ndarray, num_bytes: int, num_words: int, per_token: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        """One document: its tokens, the size of its text, and in a measured split both sizes token by token."""
        assert (per_token is not None) == self._measured and len(ids) >= 2
        if self._tokens is None or (self._offsets[-1] + len(ids) > SHARD_TOKENS and self._offsets[-1]):
            self._close_shard()
            self._open_shard()
        assert self._tokens is not None
        self._tokens.write(ids.astype(self._dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self._bytes.append(num_bytes)
        self._words.append(num_words)
        for name, values in zip(self._columns, per_token or (), strict=True):
            self._columns[name].write(values.astype("<u4").tobytes())
        self.num_documents += 1
        self.num_tokens += len(ids)
        self.num_bytes += num_bytes
        self.num_words += num_words

    def finish(self) -> dict[str, Any]:
        """Closes the last shard; the record of this split for prepared.json."""
        self._close_shard()
        counts = {key: getattr(self, f"num_{key}") for key in ("documents", "tokens", "bytes", "words")}
        return {**counts, "shards": self.shards}

    def _open_shard(self) -> None:
        name = f"{self._split}-{len(self.shards):05d}"
        self.shards.append(name)
        self._tokens = _HashedFile(self._folder / f"{name}.bin")
        if self._measured:
            self._columns = {c: _HashedFile(self._folder / f"{name}.{c}") for c in ("token_bytes", "token_words")}
        self._offsets, self._bytes, self._words = array("q", [0]), array("q"), array("q")

    def _close_shard(self) -> None:
        if self._tokens is None:
            return
        columns = {"idx": self._offsets, "bytes": self._bytes, "words": self._words}
        for suffix, values in columns.items():
            file = _HashedFile(self._folder / f"{self.shards[-1]}.{suffix}")
            file.write(np.asarray(values).astype("<i8").tobytes())
            self._close(file)
        for file in (self._tokens, *self._columns.values()):
            self._close(file)
        self._tokens = None

    def _close(self, file: "_HashedFile") -> None:
        self.files[file.path.name] = file.close()


class _HashedFile:
    """A file being written, and the hash of what was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115, closed by close()
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def close(self) -> dict[str, Any]:
        self._file.flush()
        sync(self._file.fileno())
        self._file.close()
        return {"size": self._size, "sha256": self._hash.hexdigest()}
