"""A progress bar on the terminal, and nothing where there is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


@contextmanager
def bytes_bar(label: str, total: int | None, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr; what it yields is called with the bytes just done.

    Args:
        total: None while it is unknown.
        wanted: False for no bar at all.
    """
    with _bar(label, total, DownloadColumn(), wanted) as advance:
        yield advance


@contextmanager
def count_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of things on stderr; what it yields is called with the number of those just done."""
    with _bar(label, total, MofNCompleteColumn(), True) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int | None, amount: ProgressColumn, wanted: bool) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)
