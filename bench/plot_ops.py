"""Draws the rows of bench/results/ops_*.csv: ms of forward and forward+backward by corner, shape and provider, with the
time that the bytes alone would take at the bandwidth of a large copy.

python bench/plot_ops.py bench/results/ops_h200.csv    # writes docs/results/ops_h200.png
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

ROOT = Path(__file__).parent.parent
MODES = ("forward", "forward+backward")
COLUMNS = {"op", "provider", "mode", "shape", "device", "median_ms", "copy_share"}  # that are read


def shape_label(shape: str) -> str:
    numbers = {part[0]: part[1:] for part in shape.split()}
    return f"{numbers['B']} x {numbers['T']}"


def draw(axes, rows: list[dict[str, str]], colours: dict[str, str]) -> None:
    """A group of bars a shape, one a provider; a line over each group is the bytes' time."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    providers = [name for name in colours if any(row["provider"] == name for row in rows)]
    width = 0.8 / max(len(providers), 1)
    for i, name in enumerate(providers):
        found = {row["shape"]: row for row in rows if row["provider"] == name}
        at = [x for x, shape in enumerate(shapes) if shape in found]
        heights = [float(found[shapes[x]]["median_ms"]) for x in at]
        bars = axes.bar([x - 0.4 + width * (i + 0.5) for x in at], heights, width, label=name, color=colours[name])
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=2, rotation=90)  # upright they would lie over each other
    for x, shape in enumerate(shapes):
        row = next(r for r in rows if r["shape"] == shape)
        axes.hlines(float(row["copy_share"]) * float(row["median_ms"]), x - 0.4, x + 0.4, color="black", linewidth=1)
    axes.set_xticks(range(len(shapes)), [shape_label(shape) for shape in shapes], fontsize=8)
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    arguments = parser.parse_args()
    written = "give one that bench/ops.py --out has written, as bench/results/ops_h200.csv"
    if not arguments.rows.is_file():
        parser.error(f"{arguments.rows} is no file; {written}")
    with arguments.rows.open() as file:
        table = csv.DictReader(file)
        if missing := COLUMNS - set(table.fieldnames or ()):
            parser.error(f"{arguments.rows} has no {', '.join(sorted(missing))}; {written}")
        rows = [row for row in table if row["mode"] in MODES and row["shape"].endswith("H16 K128 V128")]
    if not rows:
        parser.error(f"{arguments.rows} has no times of 16 heads of 128, which is what is drawn")
    corners = list(dict.fromkeys(row["op"] for row in rows))
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["provider"] for row in rows))}
    figure, grid = pyplot.subplots(
        2, len(corners), figsize=(3.2 * len(corners), 7), layout="constrained", squeeze=False
    )
    for column, corner in enumerate(corners):
        for line, mode in enumerate(MODES):
            draw(grid[line][column], [r for r in rows if r["op"] == corner and r["mode"] == mode], colours)
            grid[line][column].set_title(f"{corner}, {mode}", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("ms")
    handles = {name: pyplot.Rectangle((0, 0), 1, 1, color=colour) for name, colour in colours.items()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    device = rows[0]["device"]
    figure.suptitle(f"linear_attention, 32,768 tokens, 16 heads of 128, bf16, {device}; black: the bytes alone")
    picture = ROOT / "docs/results" / f"{arguments.rows.stem}.png"
    figure.savefig(picture, dpi=110)
    print(picture)


if __name__ == "__main__":
    main()
