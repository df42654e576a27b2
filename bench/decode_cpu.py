"""Tokens a second of the decode step on a CPU, and which share of the memory's copy bandwidth that is.

    OMP_WAIT_POLICY=passive python bench/decode_cpu.py                      # both sizes, all dtypes, batch 1 and 8
    python bench/decode_cpu.py --sizes 125M --dtypes int8 --batches 1 --threads 2 --seconds 20

One process. Our native step, the model's own `step_` in torch, and llama.cpp on a Llama of the same number of
parameters (head tied, random weights, same precision: F32, BF16, Q8_0; llama_cpp_decode.py) take turns, with copies of
256 MB between them, so that whatever else the machine does meets all alike. Lower quartiles: a disturbed call is only
ever slower. `share` is the bytes that a token must read and write (weights once, the state twice) over its time,
against the upper quartile of the copies: bytes read and written by torch's `copy_`, on as many threads.
"""

import argparse
import csv
import importlib.util
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from glade.infer.step import decode_step
from glade.model import LanguageModel, ModelConfig
from glade.model.quantized import Int8Weight, quantize

RESULTS = Path(__file__).parent / "results" / "decode_cpu.csv"
SIZES: dict[str, dict[str, Any]] = {
    "30M": {"dim": 384, "num_layers": 8, "num_heads": 6, "vocab_size": 32000},
    "125M": {"dim": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 32000},
}
COLUMNS = ["model", "parameters", "dtype", "batch", "threads", "device", "versions", "path", "p25_ms", "median_ms"]
COLUMNS += ["tokens_per_s", "step_bytes", "copy_gb_per_s", "share", "runs", "command"]
# calls of one contender in a turn; the first is not counted, since the caches are another's
CALLS = 4


def build(size: str, mixer: str, dtype: str) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(mixer=mixer, **SIZES[size])).eval()
    return quantize(model) if dtype == "int8" else model.to(getattr(torch, dtype))


def weight_bytes(model: LanguageModel) -> int:
    held = [(p.values, p.scales) if isinstance(p, Int8Weight) else (p,) for p in model.parameters()]
    return sum(x.nbytes for tensors in held for x in tensors)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


class Copy:
    """Copies of 256 MB: bytes read and written a second."""

    def __init__(self) -> None:
        self.source, self.target = torch.ones(2**26), torch.ones(2**26)
        self.rates: list[float] = []

    def __call__(self) -> None:
        start = time.perf_counter()
        self.target.copy_(self.source)
        self.rates.append(2 * self.source.nbytes / (time.perf_counter() - start))


def turns(contenders: dict[str, Callable[[], object]], copy: Copy, seconds: float) -> dict[str, list[float]]:
    """Seconds of the calls of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(copy.rates) < 5:
        for name, run in contenders.items():
            copy()
            run()
            for _ in range(CALLS - 1):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    return times


def peer(size: str, dtype: str, batch: int, threads: int, parameters: int, folder: Path) -> Any:
    """llama.cpp's decoder of the same size and precision, or None where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
        return None
    from llama_cpp_decode import Decoder, write_model

    shape, path = SIZES[size], folder / f"{size}-{dtype}.gguf"
    if not path.exists():
        names = {"dim": "dim", "layers": "num_layers", "heads": "num_heads", "vocab": "vocab_size"}
        write_model(path, dtype, parameters=parameters, **{name: shape[key] for name, key in names.items()})
    return Decoder(path, batch, threads, shape["vocab_size"])


def measure(args: argparse.Namespace, size: str, dtype: str, batch: int, threads: int, folder: Path) -> list[dict]:
    torch.set_num_threads(threads)
    model = build(size, args.mixer, dtype)
    step = decode_step(model)
    assert step.path == "native", step.reason
    ids = torch.arange(1, batch + 1)
    state, other_state = model.init_state(batch), model.init_state(batch)
    contenders: dict[str, Callable[[], object]] = {"native": lambda: step(ids, state)}
    # widening every matrix for a token is not what `step_` is for
    if dtype != "int8" and not args.no_torch:
        contenders["torch step_"] = lambda: model.step_(ids, other_state)
    decoder = None if args.no_llama else peer(size, dtype, batch, threads, model.num_parameters(), folder)
    if decoder is not None:
        contenders["llama.cpp"] = decoder.step
    copy = Copy()
    with step.held():
        times = turns(contenders, copy, args.seconds)
    if decoder is not None:
        decoder.close()
    moved, bandwidth = weight_bytes(model) + 2 * state.nbytes, quantile(copy.rates, 0.75)
    rows = []
    for name, taken in times.items():
        p25 = quantile(taken, 0.25)
        of_model = {
            "model": f"{'llama' if name == 'llama.cpp' else args.mixer} {size}",
            "parameters": model.num_parameters(),
            "dtype": dtype,
            "batch": batch,
            "threads": threads,
            "device": f"cpu ({processor()}, {torch.backends.cpu.get_cpu_capability()})",
            "versions": versions(),
            "path": name,
        }
        measured = {
            "p25_ms": f"{p25 * 1e3:.3f}",
            "median_ms": f"{quantile(taken, 0.5) * 1e3:.3f}",
            "tokens_per_s": f"{batch / p25:.1f}",
            "step_bytes": moved,
            "copy_gb_per_s": f"{bandwidth / 1e9:.1f}",
            "share": f"{moved / p25 / bandwidth:.2f}" if name != "llama.cpp" else "",
            "runs": len(taken),
            "command": args.command,
        }
        rows.append(of_model | measured)
    return rows


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in ("glade", "torch", "llama_cpp_python"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "; ".join(found)


def save(rows: list[dict]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--mixer", default="gdn2")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=15.0, help="of turns for each case")
    parser.add_argument("--no-llama", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--no-torch", action="store_true", help="leave torch's step_ out")
    parser.add_argument("--folder", type=Path, help="where the peer's models are kept; none: they are deleted")
    args = parser.parse_args()
    args.command = "python bench/decode_cpu.py"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for size in args.sizes:
            for dtype in args.dtypes:
                for batch in args.batches:
                    for threads in args.threads:
                        rows = measure(args, size, dtype, batch, threads, folder)
                        for row in rows:
                            print(*(row[k] for k in ("model", "dtype", "batch", "threads", "path", "p25_ms")),
                                  *(row[k] for k in COLUMNS[9:11] + COLUMNS[12:15]), flush=True)  # fmt: skip
                        save(rows)


if __name__ == "__main__":
    main()
