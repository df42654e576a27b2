"""Kernels of `linear_attention` on one GPU: time, bytes and share of the copy bandwidth, beside the peers installed.

    python bench/ops.py                                     # every corner, the three shapes of 32,768 tokens
    python bench/ops.py --corners gdn2 --shapes 16x2048     # one of them
    python bench/ops.py --corners gla --heads 4x256x512     # other heads: number, K, V
    python bench/ops.py --shapes 1x32768/256                # 256 documents of uneven lengths, packed
    python bench/ops.py --kernels                           # also the time of each kernel, by torch's profiler
    python bench/ops.py --cold glade --shapes               # the first call of every corner, nothing compiled before
    python bench/ops.py --out bench/results/ops_h200.csv    # adds to the file; bench/plot_ops.py draws it

bf16 inputs, g fp32, state from zeros, 16 heads of K = V = 128 unless said otherwise. `glade, recomputing` keeps the
inputs only for the backward. Peers (flash-linear-attention where `import fla` works, FlashQLA where `import flash_qla`
does) run on the same inputs, a call of theirs after each of ours. Times are medians with the 20th and 80th percentile
of CUDA-event times, and the GPU's alone: it is kept waiting until the host has launched a whole call, and what the host
takes for that is `host_ms`. A kernel's time is the mean of ten calls, forward and backward. `bytes` counts every input
read once and every output and gradient written once, and `copy_share` is their time at the bandwidth of a large copy,
measured first, over the median; `ratio` is a peer's median over that of `glade`. Nothing is timed before it is
compared, gradients too, with backend `torch` in fp64 on the same inputs. A first call is timed in a process of its own,
with empty folders for all that Triton, Inductor and TileLang compile.

FLA 0.6.0 refuses gated products with a scalar decay on Hopper with Triton 3.4 to 3.7.0, since their gradients are
wrong there unless TileLang is installed; such a peer is left out, and why is printed. `--lift-refusal` times it
nevertheless, as "fla, refusal lifted".
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glade.ops.linear_attention import linear_attention, recomputing
from glade.ops.linear_attention.parity import CORNERS, Shape, errors_between, failures, make_inputs

COLUMNS = ["op", "provider", "mode", "shape", "dtype", "device", "versions", "median_ms", "p20_ms", "p80_ms", "bytes"]
COLUMNS += ["copy_share", "ratio", "host_ms", "peak_bytes", "first_call_s", "command"]
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
Op = Callable[[Inputs, Tensor | None], Tensor]  # of the inputs and cu_seqlens


def glade_op(inputs: Inputs, cu_seqlens: Tensor | None = None) -> Tensor:
    named: dict[str, Any] = {name: inputs[name] for name in ("g", "erase", "write") if name in inputs}
    q, k, v = (inputs[name] for name in "qkv")
    return linear_attention(q, k, v, **named, cu_seqlens=cu_seqlens, backend="triton")[0]


def glade_op_recomputing(inputs: Inputs, cu_seqlens: Tensor | None = None) -> Tensor:
    with recomputing():
        return glade_op(inputs, cu_seqlens)


def peer_ops(corner: str, lift_refusal: bool = False) -> Iterator[tuple[str, Op]]:
    """The peers' ops by name, on the same tensors: erase stands for their beta where both gates are one scalar."""
    found = []
    if corner in PEERS and find_spec("fla") is not None:
        module, name = PEERS[corner]
        if lift_refusal:
            vars(import_module("fla.ops.common.chunk_o"))["TRITON_ABOVE_3_7_1"] = True
        lifted = lift_refusal and corner in ("gdn", "scalar-decay")
        found.append(("fla, refusal lifted" if lifted else "fla", getattr(import_module(f"fla.ops.{module}"), name)))
    if corner == "gdn" and find_spec("flash_qla") is not None:
        found.append(("flashqla", import_module("flash_qla").chunk_gated_delta_rule))
    names = {"delta": ("erase",), "gdn": ("g", "erase"), "kda": ("g", "erase"), "gdn2": ("g", "erase", "write")}
    gates = names.get(corner, ("g",))
    for name, function in found:

        def op(inputs: Inputs, cu_seqlens: Tensor | None = None, function: Callable[..., Any] = function) -> Tensor:
            named = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens.long()}
            return function(inputs["q"], inputs["k"], inputs["v"], *(inputs[x] for x in gates), **named)[0]

        yield name, op


def both_ways(op: Op, inputs: Inputs, do: Tensor, cu_seqlens: Tensor | None = None) -> None:
    torch.autograd.grad(op(inputs, cu_seqlens), list(inputs.values()), do, allow_unused=True)


def able(providers: dict[str, Op], inputs: Inputs, do: Tensor, cu_seqlens: Tensor | None) -> dict[str, Op]:
    """Those that run; of a peer that does not, why not is printed."""
    ran = {}
    for name, op in providers.items():
        try:
            both_ways(op, inputs, do, cu_seqlens)
            ran[name] = op
        except Exception as error:
            if name.startswith("glade"):
                raise
            print(f"{name} left out: {str(error)[:200]}", flush=True)
    return ran


class Times(NamedTuple):
    device_ms: list[float]
    host_ms: list[float]


def event_ms(work: Callable[[], object]) -> tuple[float, float]:
    """The device's time, and the host's until all is launched."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    started = time.perf_counter()
    work()
    host_ms = 1e3 * (time.perf_counter() - started)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), host_ms


def interleaved_ms(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """`repeats` times of each, in turns; before every call a write twice as large as the L2 cache empties it."""
    cache = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")
    times = {name: Times([], []) for name in works}
    cycles_a_ms = 10**7 / event_ms(lambda: torch.cuda._sleep(10**7))[0]
    wait_ms = 0.0
    for i in range(repeats + 5):
        for name, work in works.items():
            cache.zero_()
            torch.cuda._sleep(int(wait_ms * cycles_a_ms))
            device_ms, host_ms = event_ms(work)
            if i >= 5:
                times[name].device_ms.append(device_ms)
                times[name].host_ms.append(host_ms)
            elif i >= 2:  # the first calls compile
                wait_ms = max(wait_ms, 1.5 * host_ms)
    return times


def copy_bandwidth() -> float:
    """Bytes a second, read and written together."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    ms = statistics.median(interleaved_ms({"copy": lambda: y.copy_(x)}, 20)["copy"].device_ms)
    return 2 * x.nbytes / ms * 1e3


def inputs_of(corner: str, B: int, T: int, heads: tuple[int, int, int]) -> Inputs:
    H, K, V = heads
    shape = Shape(B, T, H, H, K, V)
    inputs = make_inputs(
        CORNERS[corner], shape, dtype=torch.bfloat16, given_state=False, device="cuda", drawn_on="cuda"
    )
    return {name: x.requires_grad_() for name, x in inputs.items() if x is not None}


class Case(NamedTuple):
    B: int
    T: int
    documents: int  # that the tokens of one row are packed from; 0: none are packed

    @classmethod
    def of(cls, text: str) -> "Case":
        """`16x2048`, or `1x32768/256`."""
        found = re.fullmatch(r"(\d+)x(\d+)(?:/(\d+))?", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not batch x tokens, as in 16x2048 or packed 1x32768/256")
        B, T, documents = (int(number or 0) for number in found.groups())
        if documents and (B != 1 or documents > T):
            raise argparse.ArgumentTypeError(
                f"{text!r}: documents are packed in one row and have a token at least, as in 1x{max(B, 1) * T}/{B}"
            )
        return cls(B, T, documents)

    def cu_seqlens(self) -> Tensor | None:
        if not self.documents:
            return None
        cuts = torch.randperm(self.T - 1, generator=torch.Generator().manual_seed(0))[: self.documents - 1] + 1
        return torch.tensor([0, *sorted(cuts.tolist()), self.T], dtype=torch.int32, device="cuda")


def rows_of(
    corner: str,
    case: Case,
    heads: tuple[int, int, int],
    bandwidth: float,
    repeats: int,
    lift_refusal: bool,
    kernels: bool,
) -> Iterator[dict[str, object]]:
    B, T, documents = case
    inputs, cu_seqlens = inputs_of(corner, B, T, heads), case.cu_seqlens()
    named = {"state": None, **gates_absent(), **inputs}
    wrong = failures(errors_between(named, "triton", "torch", cu_seqlens, drawn_on="cuda"), torch.bfloat16)
    if wrong:
        raise SystemExit(f"{corner} {case}: not timed, since it is wrong: {wrong}")
    do = torch.randn_like(inputs["v"])
    providers = {"glade": glade_op, "glade, recomputing": glade_op_recomputing}
    providers = able({**providers, **dict(peer_ops(corner, lift_refusal))}, inputs, do, cu_seqlens)
    modes: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward+backward": {}}
    peak_bytes = {}
    for name, op in providers.items():
        modes["forward"][name] = lambda op=op: op(inputs, cu_seqlens)
        modes["forward+backward"][name] = lambda op=op: both_ways(op, inputs, do, cu_seqlens)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        modes["forward+backward"][name]()
        peak_bytes[name] = torch.cuda.max_memory_allocated() - held
    leaf_bytes = sum(x.nbytes for x in inputs.values())
    forward_bytes = leaf_bytes + do.nbytes
    # forward reads the inputs and writes o; backward reads the inputs and do and writes their gradients
    moved = {"forward": forward_bytes, "forward+backward": 2 * forward_bytes + leaf_bytes}
    shape = f"B{B} T{T} H{heads[0]} K{heads[1]} V{heads[2]}" + f" N{documents}" * (documents > 0)
    for mode, works in modes.items():
        times = interleaved_ms(works, repeats)
        quantiles = {
            name: [torch.tensor(each.device_ms).quantile(x).item() for x in (0.2, 0.5, 0.8)]
            for name, each in times.items()
        }
        for name, (p20, median, p80) in quantiles.items():
            yield {
                "op": corner,
                "provider": name,
                "mode": mode,
                "shape": shape,
                **run_by(),
                "median_ms": round(median, 4),
                "p20_ms": round(p20, 4),
                "p80_ms": round(p80, 4),
                "bytes": moved[mode],
                "copy_share": round(moved[mode] / bandwidth * 1e3 / median, 3),
                "ratio": round(median / quantiles["glade"][1], 3),
                "host_ms": round(statistics.median(times[name].host_ms), 4),
                "peak_bytes": peak_bytes[name],
            }
    if kernels:
        from glade.ops.linear_attention.triton.trial import kernel_ms  # Triton need not be installed to be told how

        for name in (name for name in providers if name != "glade, recomputing"):
            for kernel, ms in kernel_ms(modes["forward+backward"][name]).items():
                row = {"op": corner, "provider": name, "mode": f"kernel {kernel[:60]}", "shape": shape}
                yield {**row, **run_by(), "median_ms": round(ms, 4)}


def run_by() -> dict[str, object]:
    return {
        "dtype": "bfloat16",
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
    }


def cold_row(corner: str, provider: str, heads: tuple[int, int, int]) -> dict[str, object]:
    """The first forward and backward of a process that finds nothing compiled."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: folder for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TILELANG_CACHE_DIR")}
        named = ["--first-call", provider, "--corners", corner, "--heads", "x".join(map(str, heads))]
        command = [sys.executable, __file__, *named]
        ran = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True)
    if ran.returncode != 0:
        raise SystemExit(f"the first call of {provider} for {corner} failed: {ran.stderr[-2000:]}")
    shape = f"B16 T2048 H{heads[0]} K{heads[1]} V{heads[2]}"
    seconds = float(ran.stdout.split()[-1])
    return {"op": corner, "provider": provider, "mode": "first call", "shape": shape, **run_by(),
            "first_call_s": round(seconds, 2)}  # fmt: skip


def first_call_s(corner: str, provider: str, heads: tuple[int, int, int]) -> float:
    inputs = inputs_of(corner, 16, 2048, heads)
    op = {"glade": glade_op, **dict(peer_ops(corner))}[provider]
    do = torch.randn_like(inputs["v"])
    torch.cuda.synchronize()
    begin = time.perf_counter()
    both_ways(op, inputs, do)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


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
    parser.add_argument(
        "--shapes",
        nargs="*",
        type=Case.of,
        default=[Case(16, 2048, 0), Case(4, 8192, 0), Case(1, 32768, 0)],
        help="batch x tokens, and / documents packed; default: 16x2048 4x8192 1x32768",
    )
    parser.add_argument("--heads", default="16x128x128", help="heads x K x V")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--cold", nargs="+", default=[], help="whose first call is timed as well: glade, fla, flashqla")
    parser.add_argument("--kernels", action="store_true", help="the time of each kernel, too")
    parser.add_argument("--lift-refusal", action="store_true", help="let FLA run what it refuses on Hopper")
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    parser.add_argument("--first-call", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("these are GPU kernels: run this on a machine with a CUDA device")
    H, K, V = map(int, arguments.heads.split("x"))
    if arguments.first_call:
        print(first_call_s(arguments.corners[0], arguments.first_call, (H, K, V)))
        return
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, {versions()}")
    for corner in arguments.corners:
        for provider in arguments.cold:
            tell([cold_row(corner, provider, (H, K, V))], arguments.out)
        for case in arguments.shapes:
            numbers = (bandwidth, arguments.repeats, arguments.lift_refusal, arguments.kernels)
            rows = rows_of(corner, case, (H, K, V), *numbers)
            tell(rows, arguments.out)


def tell(rows: Iterable[dict[str, object]], out: Path | None) -> None:
    """Prints rows as they come, and adds them to a file."""
    for row in rows:
        told = ("op", "provider", "mode", "shape", "median_ms", "p20_ms", "p80_ms", "copy_share", "ratio")
        told += ("host_ms", "peak_bytes")
        print(*(f"{name} {row[name]}" for name in (*told, "first_call_s") if name in row), flush=True)
        if out is not None:
            new = not out.exists()
            with out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
