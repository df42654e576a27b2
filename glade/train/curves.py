"""Pictures of runs, drawn from their metrics.jsonl alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from glade.train.log import Row, read_metrics

# distinguishable in print and for most kinds of colour blindness (Okabe and Ito's set, black first for two curves)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class Panel(NamedTuple):
    """One picture: measures of the training steps, and the same ones (`heldout_...`) of what is held out."""

    title: str
    y: str
    keys: dict[str, str]  # measure -> what it is of, "" where the panel has one alone


PANELS = (
    Panel("loss", "nats", {"loss": ""}),
    Panel("held-out bits per byte", "bits", {"bits_per_byte": ""}),
    Panel("held-out perplexity", "of a token", {"perplexity": ""}),
    Panel("accuracy", "share", {"accuracy": ""}),
    Panel("rewards", "scaled as in the loss", {"rewards_chosen": "chosen", "rewards_rejected": "rejected"}),
    Panel("margin of the rewards", "chosen - rejected", {"margin": ""}),
    Panel("log-probability of an answer", "nats", {"logp_chosen": "chosen", "logp_rejected": "rejected"}),
    Panel("distance from the reference (estimate of the KL)", "nats per token", {"kl": ""}),
)


def draw_curves(run: Path) -> Path | None:
    """runs/NAME/curves.png: a panel for whatever was measured, and learning rate with speed; None without rows."""
    rows = read_metrics(run)
    if not rows:
        return None
    measured = {key for row in rows for key in row}
    panels = [p for p in PANELS if any(key in measured or f"heldout_{key}" in measured for key in p.keys)]
    if "heldout_bits_per_byte" in measured:  # it says the same, and compares between tokenizers
        panels = [p for p in panels if "perplexity" not in p.keys]
    columns = 3 if len(panels) > 3 else 2
    lines = -(-(len(panels) + 1) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.5 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, axis in zip(panels, axes, strict=False):
        _draw_panel(axis, panel, rows)
    _draw_speed(axes[len(panels)], rows)
    for unused in axes[len(panels) + 1 :]:
        unused.set_axis_off()
    figure.suptitle(run.name)
    return _save(figure, run / "curves.png")


def _draw_panel(axis: Any, panel: Panel, rows: Sequence[Row]) -> None:
    for (key, of), colour in zip(panel.keys.items(), (COLOURS[0], COLOURS[3]), strict=False):
        trained, heldout = _with(rows, key), _with(rows, f"heldout_{key}")
        name = f"{of}, " if of else ""
        if trained:
            _line(axis, trained, key, colour, alpha=0.25)
            _line(axis, _smoothed(trained, key), key, colour, f"{name}training, running mean")
        style = {"marker": "o", "markersize": 4, "linestyle": "--" if of else "-"}
        _line(axis, heldout, f"heldout_{key}", colour if of else COLOURS[1], f"{name}held out", **style)
    _label(axis, panel.title, panel.y)
    if any(_with(rows, key) for key in panel.keys):
        axis.legend(frameon=False, fontsize="small")


def _draw_speed(axis: Any, rows: Sequence[Row]) -> None:
    trained = _with(rows, "tokens_per_s")
    _line(axis, trained, "tokens_per_s", COLOURS[2])
    _label(axis, "speed (green) and learning rate (grey)", "tokens per second")
    axis.set_ylim(bottom=0)
    rate = axis.twinx()
    _line(rate, trained, "lr", "#888888")
    rate.set_ylabel("learning rate")


def draw_comparison(runs: Sequence[tuple[str, list[Row]]], path: Path, unit: str) -> Path:
    """Held-out loss of several runs (name, rows) in `unit`, against tokens and against seconds."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for i, (name, rows) in enumerate(runs):
        colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        heldout = _with(rows, "heldout_loss")
        for axis, x in zip(axes, ("tokens", "seconds"), strict=True):
            _line(axis, heldout, "heldout_loss", colour, name, x=x, linestyle=style, marker="o", markersize=3)
    for axis, x in zip(axes, ("trained tokens", "seconds of training"), strict=True):
        _label(axis, "held-out loss", unit, x)
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
