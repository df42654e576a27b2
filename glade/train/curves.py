"""Pictures of runs, drawn from their metrics.jsonl alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from glade.train.log import Row, read_metrics

# distinguishable in print and for most kinds of colour blindness (Okabe and Ito's set, black first for two curves)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_curves(run: Path) -> Path | None:
    """runs/NAME/curves.png: loss, perplexity, accuracy, and the learning rate with the speed; None without rows."""
    rows = read_metrics(run)
    if not rows:
        return None
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    trained, heldout = _with(rows, "loss"), _with(rows, "heldout_loss")

    loss = axes[0][0]
    _line(loss, trained, "loss", COLOURS[0], "training, each logged step", alpha=0.35)
    _line(loss, _smoothed(trained, "loss"), "loss", COLOURS[0], "training, running mean")
    _line(loss, heldout, "heldout_loss", COLOURS[1], "held out", marker="o")
    _label(loss, "loss", "nats per token")
    loss.legend(frameon=False)
    _line(axes[0][1], heldout, "heldout_bits_per_byte", COLOURS[1], marker="o")
    _label(axes[0][1], "held-out bits per byte", "bits")
    _line(axes[1][0], heldout, "heldout_accuracy", COLOURS[1], marker="o")
    _label(axes[1][0], "held-out next-token accuracy", "share of tokens")

    speed = axes[1][1]
    _line(speed, trained, "tokens_per_s", COLOURS[2])
    _label(speed, "speed (green) and learning rate (grey)", "tokens per second")
    speed.set_ylim(bottom=0)
    rate = speed.twinx()
    _line(rate, trained, "lr", "#888888")
    rate.set_ylabel("learning rate")
    figure.suptitle(run.name)
    return _save(figure, run / "curves.png")


def draw_comparison(runs: Sequence[tuple[str, list[Row]]], path: Path) -> Path:
    """Held-out loss of several runs (name, rows), against tokens and against seconds."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for i, (name, rows) in enumerate(runs):
        colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        heldout = _with(rows, "heldout_loss")
        for axis, x in zip(axes, ("tokens", "seconds"), strict=True):
            _line(axis, heldout, "heldout_loss", colour, name, x=x, linestyle=style, marker="o", markersize=3)
    for axis, x in zip(axes, ("trained tokens", "seconds of training"), strict=True):
        _label(axis, "held-out loss", "nats per token", x)
        # the first evaluations are far above the rest; what matters is where the curves end
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:.2f}")
        axis.yaxis.set_minor_formatter("{x:.2f}")
    axes[1].set_ylabel("")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return _save(figure, path)


def _with(rows: Sequence[Row], key: str) -> list[Row]:
    return [row for row in rows if key in row]


def _smoothed(rows: Sequence[Row], key: str, share: float = 0.05) -> list[Row]:
    """The rows with `key` averaged over about `share` of them, up to each one."""
    width = max(1, int(len(rows) * share))
    values = [row[key] for row in rows]
    means = [sum(values[max(0, i + 1 - width) : i + 1]) / (i + 1 - max(0, i + 1 - width)) for i in range(len(rows))]
    return [{**row, key: mean} for row, mean in zip(rows, means, strict=True)]


def _line(
    axis: Any, rows: Sequence[Row], key: str, colour: str, label: str = "", x: str = "tokens", **style: Any
) -> None:
    axis.plot([row[x] for row in rows], [row[key] for row in rows], color=colour, label=label or None, **style)


def _label(axis: Any, title: str, y: str, x: str = "trained tokens") -> None:
    axis.set_title(title)
    axis.set_ylabel(y)
    axis.set_xlabel(x)
    axis.grid(alpha=0.25, which="both")
    if "tokens" in x:
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))


def _save(figure: Figure, path: Path) -> Path:
    """Written whole: a viewer never finds half a picture."""
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.name}.new.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    return path
