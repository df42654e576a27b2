"""Backend `cpu` of `linear_attention` beside the peers that run on a CPU, forward and forward+backward.

    GOMP_SPINCOUNT=1000 python bench/cpu_ops.py                      # everything; an hour
    python bench/cpu_ops.py --ops gdn --shapes 8x256x4x64 --threads 1 --modes forward --peers transformers llama

One process, fp32, unit keys, H = HV, K = V, no state given. The contenders of a case take turns, so that whatever
else the machine does meets all alike; `ratio` is the peer's lower quartile over ours (p25_ms), since a disturbed call
is only ever slower. Nothing is timed before its output agrees with ours. The peers are what is installed of
transformers (`torch_chunk_gated_delta_rule`), FLA's naive references, bitsandbytes-cpu-fork's fused kernel, llama.cpp's
op (ggml_op.py; forward only), and torch's causal softmax attention. The row "fp32 GEMM" is the time in which a product
of 512 x 512 matrices, also taking its turn, does as many operations: there the ratio is the share of that peak. With
several threads the row "glade, 1 thread" says what they gain. `others_cores` is how many cores other processes kept
busy meanwhile: rows with several threads mean something only where it is near 0.
"""

import argparse
import csv
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import ggml_op
import torch
import torch.nn.functional as F
from torch import Tensor
from window import peak_bytes, reset_peak

from glade.ops.linear_attention import linear_attention
from glade.ops.linear_attention.parity import CORNERS, Shape, errors, failures, make_inputs

RESULTS = Path(__file__).parent / "results" / "cpu_ops.csv"
OPS = ("gdn", "kda", "gdn2", "gla")
SHAPES = ("8x256x4x64", "1x2048x8x64", "1x2048x8x128", "1x8192x8x64")
COLUMNS = ["op", "shape", "dtype", "device", "threads", "versions", "median_ms", "p20_ms", "p25_ms", "p80_ms"]
COLUMNS += ["peer", "peer_median_ms", "peer_p25_ms", "ratio", "peak_bytes", "others_cores", "command"]
PRINTED = ("op", "shape", "threads", "p25_ms", "peer", "peer_p25_ms", "ratio", "others_cores")
MODES = ("forward", "forward+backward")
CHUNK = 16
Inputs = dict[str, Tensor]


class Peer(NamedTuple):
    name: str
    run: Callable[[Inputs], Tensor]
    max_tokens: int
    exact: bool = True  # computes what we compute, so that its output is compared
    backward: bool = True


def glade_op(x: Inputs) -> Tensor:
    gates = {name: x[name] for name in ("g", "erase", "write") if name in x}
    return linear_attention(x["q"], x["k"], x["v"], **gates, backend="cpu")[0]


def softmax(x: Inputs) -> Tensor:
    heads_first = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def naive_of_fla(op: str) -> ModuleType | None:
    """FLA's reference of an op, by its file: the package as a whole wants Triton."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        return None
    spec = importlib.util.spec_from_file_location(
        f"fla_naive_{op}", Path(package.submodule_search_locations[0]) / "ops" / op / "naive.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fla_peers(op: str) -> Iterator[Peer]:
    module = naive_of_fla({"gdn": "gated_delta_rule"}.get(op, op))
    if module is None:
        return
    if op == "gla":
        recurrent = module.naive_recurrent_gla
        yield Peer("fla naive recurrent", lambda x: recurrent(x["q"], x["k"], x["v"], x["g"])[0], 256)
        return
    gates = {"gdn": ("g", "erase"), "kda": ("g", "erase"), "gdn2": ("g", "erase", "write")}[op]
    names = {"gdn": ("g", "beta"), "kda": ("g", "beta"), "gdn2": ("g", "b", "w")}[op]
    suffix = "gated_delta_rule" if op == "gdn" else op
    for kind, max_tokens in (("chunk", 2048), ("recurrent", 256)):
        function = getattr(module, f"naive_{kind}_{suffix}")

        def run(x: Inputs, function=function) -> Tensor:
            named = {name: x[gate] for name, gate in zip(names, gates, strict=True)}
            return function(x["q"], x["k"], x["v"], **named)[0]

        yield Peer(f"fla naive {kind}", run, max_tokens)


def peers_of(op: str) -> Iterator[Peer]:
    yield from fla_peers(op)
    if op == "gdn" and importlib.util.find_spec("transformers"):
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as chunk

        yield Peer("transformers chunk", lambda x: chunk(x["q"], x["k"], x["v"], x["g"], x["erase"])[0], 8192)
    if op == "gdn" and importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.gdn_cpu import fused_recurrent_gated_delta_rule as fused

        def run(x: Inputs) -> Tensor:
            return fused(x["q"], x["k"], x["v"], x["erase"], x["g"], scale=x["q"].shape[-1] ** -0.5)[0]

        yield Peer("bitsandbytes-cpu-fork", run, 8192)
    if op in ("gdn", "kda") and ggml_op.libraries():
        yield Peer("llama.cpp", ggml(), 8192, backward=False)
    yield Peer("softmax SDPA", softmax, 8192, exact=False)


def ggml() -> Callable[[Inputs], Tensor]:
    """llama.cpp's op: its graph holds the inputs of the first call, and the output is copied out once, then."""
    made: list[tuple[ggml_op.GatedDeltaNet, Tensor]] = []

    def run(x: Inputs) -> Tensor:
        if not made:
            graph = ggml_op.GatedDeltaNet(x["q"], x["k"], x["v"], x["g"], x["erase"])
            graph.compute()
            made.append((graph, graph.output()))
        else:
            made[0][0].compute()
        return made[0][1]

    return run


def inputs_of(op: str, B: int, T: int, H: int, D: int) -> Inputs:
    made = make_inputs(CORNERS[op], Shape(B, T, H, H, D, D), given_state=False)
    inputs = {name: x.requires_grad_() for name, x in made.items() if x is not None}
    if op in ("gdn", "kda"):
        inputs["write"] = inputs["erase"]  # their one beta
    return inputs


def forward(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return run(inputs)


def both(run: Callable[[Inputs], Tensor], inputs: Inputs, d_o: Tensor) -> tuple[Tensor | None, ...]:
    leaves = list({id(x): x for x in inputs.values()}.values())
    return torch.autograd.grad(run(inputs), leaves, d_o, allow_unused=True)


def interleaved_ms(works: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Times of each in turns, at least 3 turns, then until `seconds` have passed. A turn is one call, or 50 ms."""
    times: dict[str, list[float]] = {name: [] for name in works}
    started = time.perf_counter()
    turns = 0
    while turns < 3 or time.perf_counter() - started < seconds:
        turns += 1
        for name, work in works.items():
            turn_ends = time.perf_counter() + 0.05
            while (before := time.perf_counter()) < turn_ends:
                work()
                times[name].append((time.perf_counter() - before) * 1e3)
    return times


def flops(op: str, B: int, T: int, H: int, D: int, mode: str) -> float:
    """Operations of the chunked form, what is computed twice counted once: products of CHUNK rows with the state, and
    triangles (pairs, their updates, and the gradients of both)."""
    products, triangles = (2, 2) if op == "gla" else (3, 4)
    if mode == "forward+backward":
        products, triangles = (2 + 4, 2 + 4) if op == "gla" else (3 + 6, 4 + 8)
    return B * T * H * (products * 2 * D * D + triangles * CHUNK * D)


def others_cpu_s() -> float:
    """Processor seconds that other processes have used since the machine started; nan where nobody counts them."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return float("nan")
    _, user, nice, system, *_ = stat.read_text().split("\n", 1)[0].split()
    own = os.times()
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def on_one_thread(work: Callable[[], object]) -> Callable[[], object]:
    def alone() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        work()
        torch.set_num_threads(threads)

    return alone


def contenders(peers: list[Peer], inputs: Inputs, mode: str) -> dict[str, Callable[[], object]]:
    """What takes turns in one mode, by name."""
    d_o = torch.randn_like(inputs["v"])
    a, b, c = (torch.randn(512, 512) for _ in range(3))

    def work(run: Callable[[Inputs], Tensor]) -> Callable[[], object]:
        return lambda: forward(run, inputs) if mode == "forward" else both(run, inputs, d_o)

    works = {"glade": work(glade_op)}
    if torch.get_num_threads() > 1:
        works["glade, 1 thread"] = on_one_thread(works["glade"])
    works |= {peer.name: work(peer.run) for peer in peers if peer.backward or mode == "forward"}
    return {**works, "gemm": lambda: torch.mm(a, b, out=c)}


def measure(op: str, shape: tuple[int, int, int, int], given: argparse.Namespace) -> Iterator[dict[str, object]]:
    B, T, H, D = shape
    inputs = inputs_of(op, *shape)
    peers = [peer for peer in peers_of(op) if peer.max_tokens >= T and any(x in peer.name for x in given.peers)]
    expected = forward(glade_op, inputs)
    for peer in peers:
        if peer.exact:
            torch.testing.assert_close(forward(peer.run, inputs), expected, rtol=1e-3, atol=1e-3)
    for mode in given.modes:
        works = contenders(peers, inputs, mode)
        reset_peak()
        before = peak_bytes()
        works["glade"]()
        after = peak_bytes()
        started, others_before = time.perf_counter(), others_cpu_s()
        times = interleaved_ms(works, given.seconds)
        others = (others_cpu_s() - others_before) / (time.perf_counter() - started)
        rate = 2 * 512**3 / lower_quartile(times["gemm"])
        times["fp32 GEMM"] = [flops(op, B, T, H, D, mode) / rate] * len(times.pop("gemm"))
        ours = times.pop("glade")
        fifths = statistics.quantiles(ours, n=5, method="inclusive")
        for peer_name, theirs in times.items():
            yield {
                "op": f"{op} {mode}",
                "shape": f"B={B} T={T} H={H} K={D} V={D}",
                "median_ms": f"{statistics.median(ours):.2f}",
                "p20_ms": f"{fifths[0]:.2f}",
                "p25_ms": f"{lower_quartile(ours):.2f}",
                "p80_ms": f"{fifths[3]:.2f}",
                "peer": peer_name,
                "peer_median_ms": f"{statistics.median(theirs):.2f}",
                "peer_p25_ms": f"{lower_quartile(theirs):.2f}",
                "ratio": f"{lower_quartile(theirs) / lower_quartile(ours):.2f}",
                "peak_bytes": "" if after is None or before is None else after - before,
                "others_cores": f"{others:.2f}",
            }


def lower_quartile(times: list[float]) -> float:
    return statistics.quantiles(times, n=4, method="inclusive")[0]


def versions() -> str:
    named = [("glade", "glade"), ("torch", "torch"), ("transformers", "transformers"), ("fla", "fla-core")]
    named += [("bitsandbytes-cpu-fork", "bitsandbytes-cpu-fork"), ("llama-cpp-python", "llama_cpp_python")]
    found = []
    for name, distribution in named:
        try:
            found.append(f"{name} {version(distribution)}")
        except PackageNotFoundError:
            continue
    return "; ".join([*found, f"python {platform.python_version()}"])


def device() -> str:
    from glade.ops.native import LIBRARY

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    assert LIBRARY is not None
    return f"cpu ({names[0] if names else platform.processor()}, {LIBRARY.isa})"


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Rows of the same op, shape, threads and peer are replaced, the others kept."""

    def key(row: dict) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("op", "shape", "threads", "peer"))

    kept: dict[tuple[str, ...], dict] = {}
    if path.exists():
        with path.open() as file:
            kept = {key(row): row for row in csv.DictReader(file)}
    kept |= {key(row): row for row in rows}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="BxTxHxD")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--peers", nargs="+", default=[""], help="parts of their names; every one by default")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=15, help="for one op, shape and mode")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    for op in given.ops:
        wrong = failures(errors(make_inputs(CORNERS[op], Shape(T=100)), "cpu"), torch.float32)
        if wrong:
            raise SystemExit(f"{op}: not timed, since it is wrong: {wrong}")
    constant = {"dtype": "float32", "device": device(), "versions": versions()}
    constant["command"] = " ".join(["python", *sys.argv])
    for threads in given.threads:
        torch.set_num_threads(threads)
        for shape in given.shapes:
            for op in given.ops:
                dims = tuple(int(x) for x in shape.split("x"))
                assert len(dims) == 4, shape
                rows = [{**constant, "threads": threads, **row} for row in measure(op, dims, given)]
                write_rows(given.out, rows)
                for row in rows:
                    print(*(row[name] for name in PRINTED))


if __name__ == "__main__":
    main()
