"""Draws the rows of bench/results/cpu_ops.csv measured on one thread: how many times slower each peer is than `cpu`.

python bench/plot_cpu_ops.py    # writes docs/results/cpu_ops.png
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

ROOT = Path(__file__).parent.parent
OPS = ("gdn", "kda", "gdn2", "gla")
MODES = ("forward", "forward+backward")


def label(shape: str) -> str:
    numbers = dict(part.split("=") for part in shape.split())
    return f"T {numbers['T']}\nD {numbers['K']}"


def draw(axes, rows: list[dict[str, str]], title: str, colours: dict[str, str]) -> None:
    shapes = sorted({row["shape"] for row in rows}, key=lambda x: [int(p.split("=")[1]) for p in x.split()][1:4:2])
    for peer in sorted({row["peer"] for row in rows}):
        ratios = {row["shape"]: float(row["ratio"]) for row in rows if row["peer"] == peer}
        at = [i for i, shape in enumerate(shapes) if shape in ratios]
        axes.plot(at, [ratios[shapes[i]] for i in at], marker="o", label=peer, color=colours[peer])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), [label(shape) for shape in shapes])
    axes.set_xlim(-0.3, 3.3)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100, 200], ["1", "2", "5", "10", "20", "50", "100", "200"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_title(title)


def main() -> None:
    with (ROOT / "bench/results/cpu_ops.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["threads"] == "1" and r["peer"] != "fp32 GEMM"]
    colours = {peer: f"C{i}" for i, peer in enumerate(sorted({row["peer"] for row in rows}))}
    figure, grid = pyplot.subplots(2, len(OPS), figsize=(14, 7), sharey=True, layout="constrained")
    for column, op in enumerate(OPS):
        for line, mode in enumerate(MODES):
            found = [row for row in rows if row["op"] == f"{op} {mode}"]
            draw(grid[line][column], found, f"{op}, {mode}", colours)
            if found:
                grid[line][column].legend(fontsize=7)
    for axes in grid[:, 0]:
        axes.set_ylabel("peer's time / ours")
    figure.suptitle("linear_attention, backend cpu, against its peers (one thread, fp32, lower quartiles)")
    figure.savefig(ROOT / "docs/results/cpu_ops.png", dpi=110)


if __name__ == "__main__":
    main()
