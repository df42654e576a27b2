"""Rows of JSON out of a file, each with the place it stands at, and what becomes of the bad ones.

Knows nothing of what a row means: that is `glade.data.preference` and `glade.data.instruction`.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from glade.config import REQUIRED, setting
from glade.data.readers import kind_of, lines
from glade.data.templates import chat_template
from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError, DataError

T = TypeVar("T")
Policy = Literal["error", "drop"]

# so many problems of a file are told in full
_TOLD = 5


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """Which file of examples a model is aligned on, and what is done with rows that cannot be used."""

    file: Path = setting(
        REQUIRED, "rows of JSON (.jsonl, or a list in a .json; .gz .xz .zst) or .parquet; docs/alignment.md"
    )
    heldout_file: Path | None = setting(None, "a file of its own to hold out, in place of a share")
    heldout: float = setting(0.1, "share of the prompts to hold out, with all rows of each")
    max_tokens: int | None = setting(None, "most tokens of prompt and completion together, BOS and EOS counted")
    too_long: Policy = setting("error", "what a row above max_tokens is: an error, or dropped (and counted)")
    bad_rows: Policy = setting("error", "what a row that cannot be used is: an error, or dropped (and counted)")
    separator: str = setting("", "stands between a plain prompt and its completion, as part of the completion")
    chat_template: str = setting("auto", "auto (the tokenizer's own, else plain), plain, alpaca, chatml, or a file")

    def __post_init__(self) -> None:
        if not 0 <= self.heldout < 1:
            raise ConfigError(f"data.heldout is {self.heldout}; it is a share of the prompts, 0 <= heldout < 1")
        if self.max_tokens is not None and self.max_tokens < 3:
            raise ConfigError(f"data.max_tokens is {self.max_tokens}; a BOS, a token and an EOS are 3")
        if self.too_long == "drop" and self.max_tokens is None:
            raise ConfigError("data.too_long=drop drops rows above data.max_tokens, and that is none; give it")


class Row(NamedTuple):
    """One value of JSON, and where it stands: "file:line", or "file: item n" in a list."""

    value: Any
    where: str


class Split(NamedTuple):
    """What is trained on, and what is held out: lists of the same kind of example."""

    train: list
    heldout: list


class BadRow(DataError):
    """What is wrong with one row, without its place."""


class TooLong(BadRow):
    """A row of more tokens than allowed."""


def read_rows(path: Path) -> Iterator[Row | tuple[str, str]]:
    """The rows of a .jsonl (blank lines are none), of a .json that holds a list, or of a .parquet.

    A line that is not JSON comes as (where, what is wrong).

    Raises:
        DataError: an unknown suffix, or a file that is damaged as a whole.
    """
    kind = kind_of(path)
    if kind == ".jsonl":
        return _read_lines(path)
    if kind == ".json":
        return _read_list(path)
    if kind == ".parquet":
        return _read_table(path)
    raise DataError(
        f"{path}: unknown kind of file; examples are .jsonl or .json, also with .gz, .xz or .zst, or .parquet"
    )


def _read_lines(path: Path) -> Iterator[Row | tuple[str, str]]:
    for number, line in lines(path):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            yield Row(json.loads(line), where)
        except ValueError as error:
            yield where, f"not valid JSON ({error}); each line is one object"


def _read_list(path: Path) -> Iterator[Row]:
    try:
        value = json.loads("".join(line for _, line in lines(path)))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: not valid JSON ({error}); a .json holds one list, a .jsonl an object a line"
        ) from error
    if not isinstance(value, list):
        raise DataError(f"{path}: {_kind(value)}, not a list of objects; a .jsonl holds an object a line")
    return (Row(item, f"{path}: item {number}") for number, item in enumerate(value, 1))


def _read_table(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs pyarrow; run `pip install 'glade[data]'`") from error
    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                # what a row of a table leaves out is a null
                yield Row({key: x for key, x in value.items() if x is not None}, f"{path}: row {number}")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); get the file again") from error


def parse_rows(path: Path, parse: Callable[[dict[str, Any]], T], *, too_long: Policy, bad_rows: Policy) -> list[T]:
    """`parse` of each row of a file. Rows that it refuses with `BadRow` are told all at once, or dropped and counted.

    Raises:
        DataError: bad rows where they are an error; no row is left.
    """
    good: list[T] = []
    bad: list[str] = []
    long: list[str] = []
    for row in read_rows(path):
        if not isinstance(row, Row):
            bad.append(": ".join(row))
            continue
        try:
            if not isinstance(row.value, dict):
                raise BadRow(f"{_kind(row.value)}, not an object")
            good.append(parse(row.value))
        except TooLong as error:
            long.append(f"{row.where}: {error}")
        except DataError as error:
            bad.append(f"{row.where}: {error}")
    fatal = (bad if bad_rows == "error" else []) + (long if too_long == "error" else [])
    total = len(good) + len(bad) + len(long)
    if fatal:
        hint = "mend them, or drop them with " + " and ".join(
            ["bad_rows=drop"] * bool(bad and bad_rows == "error")
            + ["too_long=drop"] * bool(long and too_long == "error")
        )
        raise DataError(f"{path}: {len(fatal)} of {total} rows cannot be used; {hint}\n{_some(fatal)}")
    if bad or long:
        print(
            f"{path}: dropped {len(bad)} bad and {len(long)} too long of {total} rows\n{_some(bad + long)}",
            file=sys.stderr,
        )
    if not good:
        raise DataError(f"{path}: no row is left of {total}; give a file with rows that can be used")
    return good


def _some(problems: Sequence[str]) -> str:
    shown = [f"  {problem}" for problem in problems[:_TOLD]]
    return "\n".join([*shown, *([f"  and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else [])])


def _kind(value: Any) -> str:
    """The type of a JSON value, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def text_at(row: dict[str, Any], key: str) -> str:
    """The text at a key of a row.

    Raises:
        BadRow: no such key, or no text there.
    """
    if key not in row:
        raise BadRow(f"no {key!r}; its keys are {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[key], str):
        raise BadRow(f"{key!r} is {_kind(row[key])}, not a text")
    return row[key]


def check_length(num_tokens: int, max_tokens: int | None) -> None:
    """
    Raises:
        TooLong: more tokens than `max_tokens`.
    """
    if max_tokens is not None and num_tokens > max_tokens:
        raise TooLong(f"{num_tokens} tokens, max_tokens is {max_tokens}")


def load_split(
    config: RowsConfig,
    tokenizer: Tokenizer,
    read_file: Callable[..., list[T]],
    prompt: Callable[[T], Sequence[int]],
    seed: int,
) -> Split:
    """What `read_file` makes of the config's files as a `Split`, by `heldout_file` or by a share of the prompts."""
    read = partial(
        read_file,
        tokenizer=tokenizer,
        chat_template=config.chat_template,
        separator=config.separator,
        max_tokens=config.max_tokens,
        too_long=config.too_long,
        bad_rows=config.bad_rows,
    )
    rows = read(config.file)
    if config.heldout_file is None:
        return split_by_prompt(rows, prompt, config.heldout, seed)
    heldout = read(config.heldout_file)
    known = {tuple(prompt(row)) for row in rows}
    shared = sum(tuple(prompt(row)) in known for row in heldout)
    if shared:
        raise DataError(
            f"{config.heldout_file}: {shared} of {len(heldout)} rows have a prompt that {config.file} trains on; take "
            f"them out of one of the files"
        )
    return Split(rows, heldout)


def split_by_prompt(rows: Sequence[T], prompt: Callable[[T], Sequence[int]], share: float, seed: int) -> Split:
    """Holds out about `share` of the distinct prompts (at least one, unless share is 0), each with all its rows.

    A function of the prompts and the seed: neither the order of the file nor repeated rows change who is held out.

    Raises:
        DataError: too few prompts to train on some and hold out others.
    """

    def key(row: T) -> bytes:
        return hashlib.sha256(f"{seed} {' '.join(map(str, prompt(row)))}".encode()).digest()

    keys = [key(row) for row in rows]
    ordered = sorted(set(keys))
    if share and len(ordered) < 2:
        raise DataError(
            f"holding out a share of {share} of the prompts needs at least 2, and there is {len(ordered)}; give "
            f"heldout=0, or a heldout_file"
        )
    count = min(max(round(share * len(ordered)), 1), len(ordered) - 1) if share else 0
    held = set(ordered[:count])
    return Split(
        [row for row, k in zip(rows, keys, strict=True) if k not in held],
        [row for row, k in zip(rows, keys, strict=True) if k in held],
    )


def use_template(tokenizer: Tokenizer, spec: str) -> None:
    """Gives a tokenizer the chat template that a spec names, to travel with it."""
    tokenizer.chat_template = chat_template(tokenizer, spec)
