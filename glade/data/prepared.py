"""A prepared folder, opened: its tokenizer, its two token stores, and what prepared.json says about them."""

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np

from glade.data.files import read_json
from glade.data.store import TokenStore
from glade.data.tokenizer import Tokenizer
from glade.errors import DataError

FORMAT = 1
INDEX = "prepared.json"
TOKENIZER = "tokenizer"


def dtype_for(vocab_size: int) -> str:
    """The smallest unsigned integer, little-endian, that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def is_prepared(folder: str | Path) -> bool:
    """Whether this is a folder that `glade prepare` wrote."""
    return (Path(folder).expanduser() / INDEX).is_file()


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made: open it with `Prepared.open(folder)`.

    train, heldout    the two `TokenStore`s; documents in the order of the corpus
    tokenizer         the one they were made with
    info              prepared.json: "key", "settings", "splits" (documents, tokens, bytes, words of each), "notes", ...
    """

    folder: Path
    tokenizer: Tokenizer
    train: TokenStore
    heldout: TokenStore
    info: dict[str, Any]

    @property
    def mixture(self) -> list[tuple[TokenStore, Fraction]]:
        """The training documents as `Batches` takes them: a store for each weighted source, or one for all."""
        sources = [s for s in self.info["sources"] if s["weight"] is not None]
        if not sources:
            return [(self.train, Fraction(1))]
        return [(self.train.slice(*s["documents"]), Fraction(s["weight"])) for s in sources]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Maps a prepared folder. The sizes of its files are checked; `verify` reads them whole.

        Raises:
            DataError: not a prepared folder, one of a later format, or a damaged one.
        """
        folder = Path(folder).expanduser()
        if not is_prepared(folder):
            raise DataError(f"{folder}: no {INDEX} in it, so it is no prepared folder; make one with `glade prepare`")
        info = read_json(folder / INDEX)
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            written = info.get("format") if isinstance(info, dict) else None
            raise DataError(
                f"{folder}: format {written!r} is not {FORMAT}; prepare it again with this version of glade"
            )
        for name, file in info["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != file["size"]:
                found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
                raise _damaged(path, f"{found}, not {file['size']} bytes")
        train, heldout = (
            TokenStore.open(folder, info["splits"][split]["shards"], info["dtype"]) for split in ("train", "heldout")
        )
        tokenizer = Tokenizer.load(folder / TOKENIZER)
        if tokenizer.vocab_size != info["vocab_size"]:
            raise _damaged(folder / TOKENIZER, f"{tokenizer.vocab_size} entries, not {info['vocab_size']}")
        return cls(folder, tokenizer, train, heldout, info)

    def verify(self) -> None:
        """Reads every file and compares it with the hash taken when it was written.

        Raises:
            DataError: a file differs, or holds a token outside the vocabulary.
        """
        for name, file in self.info["files"].items():
            path = self.folder / name
            with open(path, "rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                    raise _damaged(path, "its content is not what was written")
            if path.suffix == ".bin" and np.memmap(path, self.info["dtype"], mode="r").max() >= self.info["vocab_size"]:
                raise _damaged(path, f"it holds a token outside the vocabulary of {self.info['vocab_size']}")


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: {why}; the prepared folder is damaged: delete it and prepare it again")
