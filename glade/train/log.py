"""What a run tells while it goes: rows in metrics.jsonl always, a line or a live bar on the terminal, and trackers.

A row is a flat mapping with `step` and `tokens`. Knows nothing of models or optimisers.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from glade.errors import ConfigError
from glade.model.atomic import write_file_atomically

Row = dict[str, Any]


def read_metrics(run: Path) -> list[Row]:
    """The rows of metrics.jsonl; a last line that a crash cut short is left out."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


class Log:
    """The log of one run, open while it trains.

    On resuming, rows after `resumed_step` are dropped: they tell of steps that are about to be taken again.
    """

    def __init__(
        self,
        run: Path,
        *,
        config: Row,
        resumed_step: int | None,
        wandb: str | None,
        tensorboard: bool,
        quiet: bool = False,
    ) -> None:
        self.run = run
        if resumed_step is not None:
            rows = [row for row in read_metrics(run) if row["step"] <= resumed_step]
            write_file_atomically(run / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
        self._file = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        self._trackers = [t for t in (_wandb(wandb, run, config), _tensorboard(tensorboard, run)) if t is not None]
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, emoji=False)
        self._bar = _bar(self._console) if self._console.is_terminal and not quiet else None
        self._task = self._bar.add_task("", total=1.0) if self._bar else None
        self._last_line = 0.0

    def __enter__(self) -> "Log":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def row(self, row: Row) -> None:
        """Keep a row, flushed at once."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.row(row)

    def progress(self, share: float, text: str, eta_s: float | None) -> None:
        """Move the bar; without a terminal, a line now and then."""
        text += "" if eta_s is None else f"  {_minutes(eta_s)} left"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=share, description=text)
        elif time.monotonic() - self._last_line >= 10:
            self._last_line = time.monotonic()
            self._console.print(f"{100 * share:3.0f} %  {text}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.description}"),
        console=console,
    )


class _Wandb:
    def __init__(self, project: str, run: Path, config: Row) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  (an extra, not of `dev`)

        self._run = wandb.init(project=project, name=run.name, dir=str(run), config=config, resume="allow", id=run.name)

    def row(self, row: Row) -> None:
        self._run.log(row, step=row["step"])

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def row(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


def _wandb(project: str | None, run: Path, config: Row) -> _Wandb | None:
    if project is None:
        return None
    try:
        return _Wandb(project, run, config)
    except ImportError as error:
        raise ConfigError(
            f"train.wandb is {project!r}, but wandb is not installed: pip install 'glade[track]'"
        ) from error


def _tensorboard(wanted: bool, run: Path) -> _TensorBoard | None:
    if not wanted:
        return None
    try:
        return _TensorBoard(run)
    except ImportError as error:
        raise ConfigError("train.tensorboard needs tensorboard: pip install 'glade[track]'") from error


def stdout(text: str) -> None:
    """What a verb answers (not progress): to standard output."""
    print(text, file=sys.stdout, flush=True)
