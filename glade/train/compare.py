"""`glade compare RUN...`: several runs in one table and one plot, from what they left in their folders.

With prompts it compares what two models write instead: `glade.evals.report`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from glade.config import REQUIRED, setting
from glade.errors import CheckpointError, ConfigError
from glade.evals.page import table_rows
from glade.evals.report_config import ReportConfig
from glade.model.atomic import write_file_atomically
from glade.train.curves import draw_comparison
from glade.train.log import Row, read_metrics, stdout


@dataclass(frozen=True, kw_only=True)
class CompareConfig(ReportConfig):
    """What `glade compare` can be told: runs, or with `prompts` two models and what the report on them takes."""

    runs: tuple[str, ...] = setting(REQUIRED, "run folders; with prompts two models: BASE ALIGNED")
    out: Path = setting(Path("runs"), "folder for compare.png and compare.json, or for report.html and report.json")
    json: bool = setting(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and len(self.runs) != 2:
            raise ConfigError(f"{len(self.runs)} models are given; a report with prompts is on two, BASE and ALIGNED")


# measure of what is held out -> its column and how it is shown: of text, of answers, of pairs
MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "bits_per_byte": ("bits/byte", "{:.4f}".format),
    "accuracy": ("accuracy", lambda share: f"{100 * share:.1f} %"),
    "margin": ("margin", "{:.3f}".format),
    "kl": ("kl", "{:.4f}".format),
}


class Finished(NamedTuple):
    """A run that has been trained: its folder's name, results.json, and the rows of metrics.jsonl."""

    name: str
    results: dict[str, Any]
    rows: list[Row]


def run(config: CompareConfig) -> None:
    """The verb `glade compare`: the presence of `prompts` decides what is compared."""
    if config.prompts is not None:
        _report(config)
        return
    finished = [read_run(Path(name)) for name in config.runs]
    _check_comparable(finished)
    table = [summary(f) for f in finished]
    table.sort(key=_rank)
    config.out.mkdir(parents=True, exist_ok=True)
    unit = "nats per pair" if "margin" in table[0] else "nats per token"
    plot = draw_comparison([(f.name, f.rows) for f in finished], config.out / "compare.png", unit)
    content = json.dumps(table, indent=2) + "\n"
    write_file_atomically(config.out / "compare.json", content.encode("utf-8"))
    if config.json:
        stdout(content.rstrip())
        return
    _print(table)
    stdout(f"plot {plot}")


def _report(config: CompareConfig) -> None:
    # models are needed here alone: a table of runs, and --help, load no torch
    from glade.evals.report import make_report, write_report

    base, aligned = config.runs
    report = make_report(base, aligned, config)
    page, data = write_report(report, config.out)
    if config.json:
        stdout(data.read_text(encoding="utf-8").rstrip())
        return
    shown = Table(box=None, header_style="bold")
    for name in ("measure", *(model["name"] for model in report["models"]), "change"):
        shown.add_column(name, justify="left" if name == "measure" else "right", no_wrap=True)
    for row in table_rows(report):
        shown.add_row(row["name"], row["base"], row["aligned"], row["change"])
    Console(width=160, highlight=False, emoji=False, markup=False).print(shown)
    kl, scores = report["kl"], report["scores"]
    stdout(
        f"win rate {100 * scores['win_rate']:.1f} % (wins {scores['wins']}, ties {scores['ties']}, "
        f"losses {scores['losses']}; {report['scorer']})"
    )
    stdout(f"no KL: {kl['note']}" if kl["per_token"] is None else f"KL {kl['per_token']:.4f} nats a token")
    stdout(f"page {page}")


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
    """One line of the table; of the measures those that this kind of run has."""
    model, results = finished.results["model"], finished.results["results"]
    heldout = results["heldout"]
    return {
        "run": finished.name,
        "mixer": " ".join(dict.fromkeys(model["layers"])),
        **({"objective": finished.results["config"]["dpo"]["loss"]} if "dpo" in finished.results["config"] else {}),
        "parameters": model["parameters"],
        "tokens": results["tokens"],
        "seconds": results["seconds"],
        "tokens_per_s": results["tokens_per_s"],
        "heldout_loss": heldout["loss"],
        **{name: heldout[name] for name in MEASURES if name in heldout},
        "state_bytes": model["state_bytes"],
    }


def _check_comparable(finished: list[Finished]) -> None:
    """Measures mean the same only on the same held-out tokens: of a text, or of examples."""
    texts = {f.name: _heldout(f.results["data"]) for f in finished}
    if len(set(texts.values())) > 1:
        listed = "; ".join(f"{name}: {', '.join(map(str, text))}" for name, text in texts.items())
        raise ConfigError(f"these runs were evaluated on different held-out texts ({listed}); compare like with like")


def _heldout(data: dict[str, Any]) -> tuple[str | int, ...]:
    if "heldout_digest" in data:
        return data["heldout_examples"], f"examples {data['heldout_digest'][:12]}"
    return data["corpus"], data["tokenizer"], data["heldout_tokens"]


def _rank(row: Row) -> tuple[float, float]:
    """Lower is better: of preference runs, whose losses need not be the same function, accuracy decides first."""
    return -row["accuracy"] if "margin" in row else 0.0, row["heldout_loss"]


def _print(table: list[Row]) -> None:
    columns = {
        "run": lambda row: row["run"],
        "mixer": lambda row: row["mixer"],
        **({"objective": lambda row: row["objective"]} if "objective" in table[0] else {}),
        "parameters": lambda row: f"{row['parameters']:,}",
        "tokens": lambda row: f"{row['tokens']:,}",
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "held-out loss": lambda row: f"{row['heldout_loss']:.4f}",
        **{title: _cell(name, shown) for name, (title, shown) in MEASURES.items() if name in table[0]},
        "state": lambda row: f"{row['state_bytes'] / 1024:.0f} KiB",
    }
    shown = Table(box=None, header_style="bold")
    for name in columns:
        shown.add_column(name, justify="left" if name in ("run", "mixer", "objective") else "right", no_wrap=True)
    for row in table:
        shown.add_row(*(cell(row) for cell in columns.values()))
    Console(width=160, highlight=False, emoji=False, markup=False).print(shown)


def _cell(name: str, shown: Callable[[float], str]) -> Callable[[Row], str]:
    # a loss without a reference model has no distance from one
    return lambda row: shown(row[name]) if name in row else "-"
