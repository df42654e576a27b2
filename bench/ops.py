"""Kernels of `linear_attention` on one GPU: time, bytes and share of the copy bandwidth, beside the peers installed.

    python bench/ops.py                                     # every corner, the three shapes of 32,768 tokens
    python bench/ops.py --corners gdn2 --shapes 16x2048     # one of them
    python bench/ops.py --corners gla --heads 4x256x512     # other heads: number, K, V
    python bench/ops.py --out bench/results/ops_h100.csv

bf16 inputs, g fp32, state from zeros, 16 heads of K = V = 128 unless said otherwise. `glade, recomputing` keeps the
inputs only for the backward. Peers (flash-linear-attention where `import fla` works, FlashQLA where `import flash_qla`
does) run on the same inputs, a call of theirs after each of ours. Times are medians with the 20th and 80th percentile
of CUDA-event times; `bytes` counts every input read once and every output and gradient written once, and `copy_share`
is their time at the bandwidth of a large copy, measured first, over the median. Nothing is timed before it is
compared, gradients too, with backend `torch` in fp64 on the same inputs.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from glade.ops.linear_attention import linear_attention, recomputing
from glade.ops.linear_attention.parity import CORNERS, Shape, errors_between, failures, make_inputs

COLUMNS = ["op", "provider", "mode", "shape", "dtype", "device", "versions", "median_ms", "p20_ms", "p80_ms", "bytes"]
COLUMNS += ["copy_share", "peak_bytes", "first_call_s", "command"]
# the function of fla.ops that computes a corner, and its keyword for g
PEERS = {
    "scalar-decay": ("simple_gla", "chunk_simple_gla"),
    "gla": ("gla", "chunk_gla"),
    "delta": ("delta_rule", "chunk_delta_rule"),
    "gdn": ("gated_delta_rule", "chunk_gated_delta_rule"),
    "kda": ("kda", "chunk_kda"),
    "gdn2": ("gdn2", "chunk_gdn2"),
}
Inputs = dict[str, Tensor]


def glade_op(inputs: Inputs) -> Tensor:
    gates = {name: inputs[name] for name in ("g", "erase", "write") if name in inputs}
    return linear_attention(inputs["q"], inputs["k"], inputs["v"], **gates, backend="triton")[0]


def glade_op_recomputing(inputs: Inputs) -> Tensor:
    with recomputing():
        return glade_op(inputs)


def peer_ops(corner: str) -> Iterator[tuple[str, Callable[[Inputs], Tensor]]]:
    """The peers' ops by name, on the same tensors: erase stands for their beta where both gates are one scalar."""
    found = []
    if corner in PEERS and find_spec("fla") is not None:
        module, name = PEERS[corner]
        found.append(("fla", getattr(import_module(f"fla.ops.{module}"), name)))
    if corner == "gdn" and find_spec("flash_qla") is not None:
        found.append(("flashqla", import_module("flash_qla").chunk_gated_delta_rule))
    names = {"delta": ("erase",), "gdn": ("g", "erase"), "kda": ("g", "erase"), "gdn2": ("g", "erase", "write")}
    gates = names.get(corner, ("g",))
    for name, op in found:
        yield name, lambda inputs, op=op: op(inputs["q"], inputs["k"], inputs["v"], *(inputs[x] for x in gates))[0]


def event_ms(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleaved_ms(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """`repeats` times of each, in turns; before every call a write twice as large as the L2 cache empties it."""
    cache = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(repeats + 5):
        for name, work in works.items():
            cache.zero_()
            ms = event_ms(work)
            if i >= 5:
                times[name].append(ms)
    return times


def copy_bandwidth() -> float:
    """Bytes a second, read and written together."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    ms = statistics.median(interleaved_ms({"copy": lambda: y.copy_(x)}, 20)["copy"])
    return 2 * x.nbytes / ms * 1e3


def inputs_of(corner: str, B: int, T: int, heads: tuple[int, int, int]) -> Inputs:
    H, K, V = heads
    shape = Shape(B, T, H, H, K, V)
    inputs = make_inputs(CORNERS[corner], shape, dtype=torch.bfloat16, given_state=False, device="cuda")
    return {name: x.requires_grad_() for name, x in inputs.items() if x is not None}


def rows_of(
    corner: str, B: int, T: int, heads: tuple[int, int, int], bandwidth: float, repeats: int
) -> Iterator[dict[str, object]]:
    inputs = inputs_of(corner, B, T, heads)
    wrong = failures(errors_between({"state": None, **gates_absent(), **inputs}, "triton", "torch"), torch.bfloat16)
    if wrong:
        raise SystemExit(f"{corner} {B}x{T}: not timed, since it is wrong: {wrong}")
    leaves = list(inputs.values())
    do = torch.randn_like(inputs["v"])
    providers = {"glade": glade_op, "glade, recomputing": glade_op_recomputing, **dict(peer_ops(corner))}
    modes: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward+backward": {}}
    first_call_s, peak_bytes = {}, {}
    for name, op in providers.items():
        modes["forward"][name] = lambda op=op: op(inputs)
        modes["forward+backward"][name] = lambda op=op: torch.autograd.grad(op(inputs), leaves, do, allow_unused=True)
        begin = time.perf_counter()
        modes["forward+backward"][name]()
        torch.cuda.synchronize()
        first_call_s[name] = time.perf_counter() - begin
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        modes["forward+backward"][name]()
        peak_bytes[name] = torch.cuda.max_memory_allocated() - held
    forward_bytes = sum(x.nbytes for x in leaves) + do.nbytes
    # forward reads the inputs and writes o; backward reads the inputs and do and writes their gradients
    moved = {"forward": forward_bytes, "forward+backward": 2 * forward_bytes + sum(x.nbytes for x in leaves)}
    for mode, works in modes.items():
        for name, times in interleaved_ms(works, repeats).items():
            p20, median, p80 = (torch.tensor(times).quantile(x).item() for x in (0.2, 0.5, 0.8))
            yield {
                "op": corner,
                "provider": name,
                "mode": mode,
                "shape": f"B{B} T{T} H{heads[0]} K{heads[1]} V{heads[2]}",
                "dtype": "bfloat16",
                "device": torch.cuda.get_device_name(),
                "versions": versions(),
                "median_ms": round(median, 4),
                "p20_ms": round(p20, 4),
                "p80_ms": round(p80, 4),
                "bytes": moved[mode],
                "copy_share": round(moved[mode] / bandwidth * 1e3 / median, 3),
                "peak_bytes": peak_bytes[name],
                "first_call_s": round(first_call_s[name], 1),
                "command": " ".join(["python", *sys.argv]),
            }


def gates_absent() -> dict[str, None]:
    return {"g": None, "erase": None, "write": None}


def versions() -> str:
    found = [f"torch {torch.__version__}"]
    for name in ("triton", "flash-linear-attention", "flash-qla"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corners", nargs="+", default=list(CORNERS), choices=list(CORNERS))
    parser.add_argument("--shapes", nargs="+", default=["16x2048", "4x8192", "1x32768"], help="batch x tokens")
    parser.add_argument("--heads", default="16x128x128", help="heads x K x V")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("these are GPU kernels: run this on a machine with a CUDA device")
    H, K, V = map(int, arguments.heads.split("x"))
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, {versions()}")
    rows = []
    for corner in arguments.corners:
        for shape in arguments.shapes:
            B, T = map(int, shape.split("x"))
            for row in rows_of(corner, B, T, (H, K, V), bandwidth, arguments.repeats):
                rows.append(row)
                print(*(f"{name} {row[name]}" for name in COLUMNS[:4] + COLUMNS[7:14]), flush=True)
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
