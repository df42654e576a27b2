"""Host time of an engine's step: what it does itself, between two decode steps.

    OMP_NUM_THREADS=1 python bench/engine.py
    python bench/engine.py --batches 64 --profile

A stand-in for the program answers at once, on the CPU: `captured` for a GPU's recorded step with its sampling, `native`
for a CPU's, whose rows the engine then draws; the model beside it is of 2 layers of width 32, sampling is greedy.
Percentiles are over steps. In `steady` everybody decodes; in `answers of N` tokens each answer is followed by another
request of one token, so that a step also holds its share of endings (the state is kept for the prefix cache) and
beginnings.
"""

import argparse
import cProfile
import csv
import platform
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glade.infer import slots
from glade.infer.config import SamplingParams
from glade.infer.engine import Delta, Engine, Request
from glade.model import LanguageModel, ModelConfig
from glade.model.state import State

RESULTS = Path(__file__).parent / "results" / "engine_host.csv"
VOCAB = 64


class AtOnce:
    """What `decode_step`, its captured program and its recordings are to `Slots`, and no work at all."""

    reason = ""

    def __init__(self, path: str) -> None:
        self.path = path
        self._answers: dict[int, Tensor] = {}

    @property
    def captured(self) -> "AtOnce | None":
        return self if self.path == "captured" else None

    def __call__(self, ids: Tensor, state: State, slots: Tensor | None = None) -> Tensor:
        """Logits."""
        if len(ids) not in self._answers:
            self._answers[len(ids)] = torch.randn(len(ids), VOCAB)
        return self._answers[len(ids)]

    def bind(self, state: State) -> object:
        return state.layers

    def drawing(self, rules: object, most_tops: int) -> Callable[..., Tensor]:
        return self.run

    def clear(self) -> None:
        pass

    def run(self, kind: Any, tensors: Sequence[Tensor], function: object) -> Tensor:
        """`Graphs.run`: ids that count up, each with the log-probability -1."""
        rows = len(tensors[0])
        if rows not in self._answers:
            bits = torch.full((rows,), -1.0).view(torch.int32)
            self._answers[rows] = torch.stack([torch.arange(rows) % VOCAB, bits.long()], dim=1)
        return self._answers[rows]


def nobody(delta: Delta) -> None:
    assert delta.error is None, delta.error


def time_steps(path: str, batch: int, length: int | None, steps: int, profile: bool) -> list[float]:
    """Microseconds of each step."""
    model = LanguageModel(ModelConfig(mixer="gdn", vocab_size=VOCAB, num_layers=2, dim=32)).eval()
    stand_in = AtOnce(path)
    slots.decode_step = lambda model: stand_in  # type: ignore[assignment]
    engine = Engine(model, max_batch=batch)
    engine._slots._graphs = stand_in  # type: ignore[assignment]
    asked = 0

    def ask() -> None:
        nonlocal asked
        # the first answers are of all lengths, so that not all end at once
        most = 2**31 if length is None else length if asked >= batch else 1 + asked * length // batch
        params = SamplingParams(temperature=0, max_new_tokens=most)
        engine.submit(Request(prompt=(asked % VOCAB,), params=params, stop_ids=frozenset([VOCAB])), nobody)
        asked += 1

    def step() -> float:
        stats = engine.stats()
        for _ in range(batch - stats.running - stats.prefilling - stats.waiting):
            ask()
        start = time.perf_counter()
        engine.step()
        return 1e6 * (time.perf_counter() - start)

    for _ in range(steps // 10):
        step()
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    times = [step() for _ in range(steps)]
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    engine.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", default=["captured", "native"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--length", type=int, default=100, help="tokens of an answer where answers end")
    parser.add_argument("--steps", type=int, default=5000, help="timed steps; a tenth as many go before")
    parser.add_argument("--profile", action="store_true", help="where the time goes, too; it is more then, and no row")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for path, length, batch in product(args.paths, (None, args.length), args.batches):
        times = time_steps(path, batch, length, args.steps, args.profile)
        deciles = statistics.quantiles(times, n=10)
        row = {
            "path": path,
            "what": "steady" if length is None else f"answers of {length}",
            "batch": batch,
            "steps": len(times),
            "mean_us": f"{statistics.mean(times):.1f}",
            "median_us": f"{statistics.median(times):.1f}",
            "p10_us": f"{deciles[0]:.1f}",
            "p90_us": f"{deciles[-1]:.1f}",
            "device": processor(),
            "versions": f"torch {torch.__version__}, python {platform.python_version()}",
        }
        print(*(f"{name} {value}" for name, value in list(row.items())[:8]), sep=", ", flush=True)
        if not args.no_csv and not args.profile:
            save(row)


def save(row: dict[str, Any]) -> None:
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
