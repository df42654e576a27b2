"""`glade compare RUN...`: several runs in one table and one plot, from what they left in their folders."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from glade.config import REQUIRED, setting
from glade.errors import CheckpointError, ConfigError
from glade.model.atomic import write_file_atomically
from glade.train.curves import draw_comparison
from glade.train.log import Row, read_metrics, stdout


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What `glade compare` can be told."""

    runs: tuple[str, ...] = setting(REQUIRED, "run folders")
    out: Path = setting(Path("runs"), "folder for compare.png and compare.json")
    json: bool = setting(False, "print JSON instead of a table")


class Finished(NamedTuple):
    """A run that has been trained: its folder's name, results.json, and the rows of metrics.jsonl."""

    name: str
    results: dict[str, Any]
    rows: list[Row]


def run(config: CompareConfig) -> None:
    """The verb `glade compare`."""
    finished = [read_run(Path(name)) for name in config.runs]
    _check_comparable(finished)
    table = [summary(f) for f in finished]
    table.sort(key=lambda row: row["heldout_loss"])
    config.out.mkdir(parents=True, exist_ok=True)
    plot = draw_comparison([(f.name, f.rows) for f in finished], config.out / "compare.png")
    content = json.dumps(table, indent=2) + "\n"
    write_file_atomically(config.out / "compare.json", content.encode("utf-8"))
    if config.json:
        stdout(content.rstrip())
        return
    _print(table)
    stdout(f"plot {plot}")


def read_run(folder: Path) -> Finished:
    """What a run folder holds.

    Raises:
        CheckpointError: it is no run folder, or the run was never evaluated.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no results.json: not a run folder, or a run that has not finished")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["results"]["heldout"] is None:
            raise CheckpointError(f"{folder} was never evaluated; finish it with glade train --run={folder} --resume")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r})") from error
    return Finished(folder.name, results, read_metrics(folder))


def summary(finished: Finished) -> Row:
    """One line of the table."""
    model, results = finished.results["model"], finished.results["results"]
    heldout = results["heldout"]
    return {
        "run": finished.name,
        "mixer": " ".join(dict.fromkeys(model["layers"])),
        "parameters": model["parameters"],
        "tokens": results["tokens"],
        "seconds": results["seconds"],
        "tokens_per_s": results["tokens_per_s"],
        "heldout_loss": heldout["loss"],
        "bits_per_byte": heldout["bits_per_byte"],
        "accuracy": heldout["accuracy"],
        "state_bytes": model["state_bytes"],
    }


def _check_comparable(finished: list[Finished]) -> None:
    """Losses per token mean the same only on the same held-out tokens."""
    texts = {
        f.name: (f.results["data"]["corpus"], f.results["data"]["tokenizer"], f.results["data"]["heldout_tokens"])
        for f in finished
    }
    if len(set(texts.values())) > 1:
        listed = "; ".join(f"{name}: {', '.join(map(str, text))}" for name, text in texts.items())
        raise ConfigError(f"these runs were evaluated on different held-out texts ({listed}); compare like with like")


def _print(table: list[Row]) -> None:
    columns = {
        "run": lambda row: row["run"],
        "mixer": lambda row: row["mixer"],
        "parameters": lambda row: f"{row['parameters']:,}",
        "tokens": lambda row: f"{row['tokens']:,}",
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "held-out loss": lambda row: f"{row['heldout_loss']:.4f}",
        "bits/byte": lambda row: f"{row['bits_per_byte']:.4f}",
        "accuracy": lambda row: f"{100 * row['accuracy']:.1f} %",
        "state": lambda row: f"{row['state_bytes'] / 1024:.0f} KiB",
    }
    shown = Table(box=None, header_style="bold")
    for name in columns:
        shown.add_column(name, justify="left" if name in ("run", "mixer") else "right", no_wrap=True)
    for row in table:
        shown.add_row(*(cell(row) for cell in columns.values()))
    Console(width=160, highlight=False, emoji=False, markup=False).print(shown)
