"""Documents out of files: plain text, JSON lines, parquet, WikiText, each also compressed. One document at a time.

Lines end at "\\n" only (a "\\r" before it is dropped): U+2028 and its like stand inside documents.
"""

import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from glade.errors import DataError

try:
    import zstandard
except ImportError:  # it belongs to glade[data]; asked for when a .zst is read
    zstandard = None

SEPARATOR = "<|endoftext|>"
_COMPRESSIONS = (".xz", ".gz", ".zst")
_DAMAGED = (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile, *([zstandard.ZstdError] if zstandard else []))
# " = Robert Boulter = " is a title, " = = Career = = " a section of the same article
_WIKITEXT_TITLE = re.compile(r" ?= (?!= )(.+?)(?<! =) = ?")


class Document(NamedTuple):
    """One text that stands for itself: training and evaluation begin it with an empty state.

    `name` says where it comes from, for messages: a path with a line or a number, a title.
    """

    text: str
    name: str


def read_file(path: Path, text_field: str = "text", separator: str | None = None) -> Iterator[Document]:
    """The documents of one file, by its suffix: .txt, .raw and .tokens (WikiText), .jsonl, .parquet; .xz, .gz, .zst.

    Args:
        text_field: which field of a JSON line or column of a table holds the text.
        separator: what stands between the documents of a .txt: None is "<|endoftext|>" anywhere in a line; "blank" is
            one or more blank lines; "line" makes each line one; anything else is that literal text. Where it does not
            occur, the whole file is one document. Other kinds of file know their documents, and take None only.
    Raises:
        DataError: an unknown suffix, or content that cannot be read, with the line.
    """
    kind = kind_of(path)
    if kind not in READERS:
        raise DataError(f"{path}: unknown kind of file; corpora are {', '.join(READERS)}, also with .xz, .gz or .zst")
    if separator is not None and kind != ".txt":
        raise DataError(
            f"{path}: separator={separator!r} is for .txt files; a {kind} knows its documents, leave it out"
        )
    documents = READERS[kind](path, text_field, separator)
    return (document for document in documents if document.text.strip())


def is_readable(path: Path) -> bool:
    """Whether the suffix is one that `read_file` knows."""
    return kind_of(path) in READERS


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, ".jsonl" of "a.jsonl.gz"."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _COMPRESSIONS else path.suffix.lower()


# --- bytes to lines ---


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".xz":
        return lzma.open(path)  # pyright: ignore[reportReturnType]
    if suffix == ".gz":
        return gzip.open(path)  # pyright: ignore[reportReturnType]
    if suffix == ".zst":
        if zstandard is None:
            raise DataError(f"{path}: reading .zst needs zstandard; run `pip install 'glade[data]'`")
        return io.BufferedReader(_Chunks(_zst_chunks(path)))
    return open(path, "rb")


def _zst_chunks(path: Path) -> Iterator[bytes]:
    """The content of a .zst. zstandard's own reader takes a file that was cut off for one that ends there."""
    assert zstandard is not None
    frame = zstandard.ZstdDecompressor().decompressobj()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 16):
            yield frame.decompress(chunk)
            while frame.eof and frame.unused_data:
                rest = frame.unused_data
                frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(rest)
    if not frame.eof:
        raise EOFError("the archive ends early")


class _Chunks(io.RawIOBase):
    """Pieces of bytes as a file to read."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its "\\n") of a UTF-8 file; a byte order mark and "\\r" before "\\n" are dropped."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text[:-2] + "\n" if text.endswith("\r\n") else text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: byte 0x{error.object[error.start]:02x} at column {error.start + 1} is not UTF-8; "
            f"convert the file to UTF-8"
        ) from error
    except _DAMAGED as error:
        raise DataError(f"{path}: damaged after line {number} ({error}); get the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


# --- lines to documents ---


def _read_text(path: Path, text_field: str, separator: str | None) -> Iterator[Document]:
    separator = SEPARATOR if separator is None else separator
    if separator == "line":
        return (Document(line.rstrip("\n"), f"{path}:{number}") for number, line in lines(path))
    if separator == "blank":
        return _split_at_blanks(path)
    if not separator or "\n" in separator:
        raise DataError(
            f"separator {separator!r} must be a text within one line; for blank lines use separator='blank'"
        )
    return _split_at(path, separator)


def _split_at_blanks(path: Path) -> Iterator[Document]:
    part: list[str] = []
    first = 1
    for number, line in lines(path):
        if line.strip():
            first = first if part else number
            part.append(line)
        elif part:
            yield Document("".join(part).rstrip("\n"), f"{path}:{first}")
            part = []
    yield Document("".join(part).rstrip("\n"), f"{path}:{first}")


def _split_at(path: Path, separator: str) -> Iterator[Document]:
    """The texts between separators, without the line ends that only set the separator apart."""
    part: list[str] = []
    first = 1
    separated = False
    for number, line in lines(path):
        *ended, rest = line.split(separator)
        for piece in ended:
            separated = True
            yield Document("".join([*part, piece]).strip("\n"), f"{path}:{first}")
            part, first = [], number
        part.append(rest)
    text = "".join(part)
    yield Document(text.strip("\n") if separated else text, f"{path}:{first}")


def _read_wikitext(path: Path, text_field: str, separator: str | None) -> Iterator[Document]:
    """An article from each title line to the next.

    A title stands after a blank line, which tells it from a formula; some copies of the files have no blank lines.
    """
    part: list[str] = []
    title = "before the first title"
    after_blank, any_blank = True, False
    for _, line in lines(path):
        heading = _WIKITEXT_TITLE.fullmatch(line.rstrip("\n"))
        if heading and (after_blank or not any_blank):
            yield Document("".join(part), f"{path}: {title}")
            part, title = [], heading[1]
        part.append(line)
        after_blank = not line.strip()
        any_blank = any_blank or after_blank
    yield Document("".join(part), f"{path}: {title}")


def _read_jsonl(path: Path, text_field: str, separator: str | None) -> Iterator[Document]:
    for number, line in lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON ({error}); each line is one object") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}, not an object with a field {text_field!r}")
        yield Document(text_of(row, text_field, where), where)


def text_of(row: dict, text_field: str, where: str) -> str:
    """The text in one row of a table.

    Raises:
        DataError: no such field, or one that is not text.
    """
    if text_field not in row:
        fields = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where}: no field {text_field!r}; its fields are {fields}: name one as text_field")
    value = row[text_field]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field {text_field!r} holds a {type(value).__name__}, not text; name another text_field"
        )
    return value


def _read_parquet(path: Path, text_field: str, separator: str | None) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs pyarrow; run `pip install 'glade[data]'`") from error
    try:
        file = pq.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            text_of(dict.fromkeys(file.schema_arrow.names), text_field, str(path))
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                where = f"{path}: row {row}"
                yield Document(text_of({text_field: value}, text_field, where), where)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); get the file again") from error


READERS: dict[str, Callable[[Path, str, str | None], Iterator[Document]]] = {
    ".txt": _read_text,
    ".raw": _read_wikitext,
    ".tokens": _read_wikitext,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
