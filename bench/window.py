"""Sliding-window attention against the two ways a mask does the same: time and peak memory over the row's length.

    python bench/window.py                        # every length to 32768, about ten minutes
    python bench/window.py --max-tokens 4096      # a glance

    naive mask    the whole [N, N] matrix of scores, masked, softmax, times v
    SDPA + mask   torch's fused attention, given the [N, N] band as a boolean mask

Each measurement runs in a process of its own, so that its peak is its own: how far the process's resident memory rose
above what it held with the inputs made. Nothing is measured before both peers' results are found equal. The naive
mask stops at 8192 tokens and the other at 16384: beyond, one call takes tens of seconds and many gigabytes.
"""

import argparse
import csv
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import glade
from glade.ops import attention
from glade.ops.tolerances import TOLERANCES, relative_error

B, H, K = 1, 4, 64
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
RESULTS = Path(__file__).parent / "results" / "window_cpu.csv"
CLEAR_PEAK = Path("/proc/self/clear_refs")
COLUMNS = ["op", "shape", "dtype", "device", "threads", "versions", "median_ms", "p20_ms", "p80_ms"]
COLUMNS += ["peer", "peer_median_ms", "ratio", "peak_bytes", "command"]


def band(num_tokens: int, window: int) -> Tensor:
    """[N, N] bool: a query (row) sees a key (column)."""
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    return (distance >= 0) & (distance < window)


def glade_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return attention(q, k, v, window=window, return_state=False)[0]


def naive_mask(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[3] ** -0.5
    p = scores.masked_fill(~band(q.shape[1], window), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", p, v)


def fused_mask(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=band(q.shape[1], window)).transpose(1, 2)


class Contender(NamedTuple):
    run: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    max_tokens: int


CONTENDERS = {
    "glade": Contender(glade_window, max(LENGTHS)),
    "naive mask": Contender(naive_mask, 8192),
    "SDPA + mask": Contender(fused_mask, 16384),
}


class Measurement(NamedTuple):
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_bytes: int | None  # above what the process held with the inputs made


def inputs(num_tokens: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, num_tokens, H, K, requires_grad=True) for _ in range(3)]


def call(contender: str, tensors: list[Tensor], window: int, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        o = CONTENDERS[contender].run(tensors[0], tensors[1], tensors[2], window)
        if backward:
            torch.autograd.grad(o.sum(), tensors)


def reset_peak() -> None:
    """Makes the process's peak what it holds now. Where there is no /proc, no peak is reported."""
    if CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5")


def peak_bytes() -> int | None:
    """The most memory this process held since `reset_peak`; getrusage would count what its parent held, too."""
    if not CLEAR_PEAK.exists():
        return None
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure(contender: str, num_tokens: int, window: int, backward: bool, threads: int) -> Measurement:
    """Runs in a fresh process: the first call gives the peak, the following ones the times."""
    torch.set_num_threads(threads)
    call(contender, inputs(128), 64, backward)
    tensors = inputs(num_tokens)
    reset_peak()
    before = peak_bytes()
    started = time.perf_counter()
    call(contender, tensors, window, backward)
    first_s = time.perf_counter() - started
    after = peak_bytes()
    extra = None if after is None or before is None else after - before
    times_ms = []
    for _ in range(11 if first_s < 2 else 3):
        started = time.perf_counter()
        call(contender, tensors, window, backward)
        times_ms.append((time.perf_counter() - started) * 1e3)
    fifths = statistics.quantiles(times_ms, n=5, method="inclusive")
    return Measurement(statistics.median(times_ms), fifths[0], fifths[3], extra)


def measure_alone(*arguments) -> Measurement:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def check_equal(window: int) -> None:
    """Exits unless all contenders agree on the shortest row, in the output and in every gradient."""
    tensors = inputs(LENGTHS[0])
    found = {}
    for name, contender in CONTENDERS.items():
        o = contender.run(tensors[0], tensors[1], tensors[2], window)
        found[name] = [o, *torch.autograd.grad(o.square().sum(), tensors)]
    for name, results in found.items():
        worst = max(relative_error(a, b) for a, b in zip(results, found["naive mask"], strict=True))
        if worst > TOLERANCES[torch.float32].gradient:
            sys.exit(f"{name} differs from the naive mask by {worst:.1e}; nothing is measured")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def rows_of(num_tokens: int, window: int, backward: bool, threads: int, command: str) -> list[dict[str, object]]:
    """One CSV row a contender; peers and ratios stand in glade's rows, one a peer that runs at this length."""
    measured = {
        name: measure_alone(name, num_tokens, window, backward, threads)
        for name, contender in CONTENDERS.items()
        if num_tokens <= contender.max_tokens
    }
    common = {
        "shape": f"B={B} T={num_tokens} H={H} K={K} V={K} window={window}",
        "dtype": "float32",
        "device": f"cpu ({cpu_name()}, {torch.backends.cpu.get_cpu_capability()})",
        "threads": threads,
        "versions": f"glade {glade.__version__}; torch {torch.__version__}; python {platform.python_version()}",
        "command": command,
    }
    rows = []
    pairs = [("glade", peer) for peer in measured if peer != "glade"] or [("glade", "")]
    for name, peer in [*pairs, *((peer, "") for _, peer in pairs if peer)]:
        m = measured[name]
        times = {f: f"{getattr(m, f):.2f}" for f in ("median_ms", "p20_ms", "p80_ms")}
        op = f"sliding window {'forward+backward' if backward else 'forward'}"
        row = {"op": op if name == "glade" else f"{op}, {name}", **common, **times, "peak_bytes": m.peak_bytes}
        if peer:
            peer_ms = measured[peer].median_ms
            row |= {"peer": peer, "peer_median_ms": f"{peer_ms:.2f}", "ratio": f"{peer_ms / m.median_ms:.2f}"}
        rows.append(row)
    print_line(num_tokens, backward, measured)
    return rows


def print_line(num_tokens: int, backward: bool, measured: dict[str, Measurement]) -> None:
    cells = [f"{num_tokens:6d}  {'fwd+bwd' if backward else 'fwd':8s}"]
    for name in CONTENDERS:
        m = measured.get(name)
        time_ms = f"{m.median_ms:.1f} ms" if m else "-"
        memory = f"{m.peak_bytes / 2**20:.1f} MiB" if m and m.peak_bytes is not None else "-"
        cells.append(f"{time_ms:>12s} {memory:>12s}")
    print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=512, help="tokens a token sees, itself included")
    parser.add_argument("--max-tokens", type=int, default=max(LENGTHS), help="longest row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file, written anew")
    settings = parser.parse_args()
    check_equal(settings.window)
    command = " ".join(["python", "bench/window.py", *sys.argv[1:]])
    print(f"{'T':>6s}  {'':8s}" + "".join(f"  {name:>25s}" for name in CONTENDERS))
    rows = []
    for num_tokens in (n for n in LENGTHS if n <= settings.max_tokens):
        for backward in (False, True):
            rows += rows_of(num_tokens, settings.window, backward, settings.threads, command)
    with settings.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
