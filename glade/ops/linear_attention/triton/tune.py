"""`glade bench tune`: block sizes found by measurement on the GPU at hand, written to the table (`configs.py`).

For one corner and K x V: every candidate of every launch is checked and timed in a process of its own (`trial.py`),
with the other launches as in the table; the fastest of each kernel are put together, checked and timed once more, and
take the row if that is faster than what the table gave. Chunk sizes are tried one after the other.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glade.ops.linear_attention.triton import configs
from glade.ops.linear_attention.triton.candidates import Candidate, candidates, kernel_name
from glade.ops.linear_attention.triton.configs import Config, Row
from glade.ops.linear_attention.triton.trial import Job, job_of, make

SECONDS_A_TRIAL = 180


class Setting(NamedTuple):
    """What a row of the table is for, and where its configurations are tried."""

    corner: tuple[str, ...]
    dtype: str
    K: int
    V: int
    timed: tuple[int, int, int]  # B, T, H
    checked: tuple[int, int, int] = (2, 1000, 16)

    @property
    def wide(self) -> bool:
        return self.dtype != "bfloat16"

    def job(self, config: Config) -> Job:
        return job_of(self.corner, self.dtype, self.K, self.V, self.checked, self.timed, config)


class Outcome(NamedTuple):
    """One trial: milliseconds by kernel, or why there are none."""

    label: str
    ms: dict[str, float]
    failed: str


class Trials:
    """Runs trials of one setting, `workers` at a time, against one fp64 reference."""

    def __init__(self, setting: Setting, folder: Path, workers: int):
        self.setting, self.folder, self.workers = setting, folder, workers
        self.reference, self.lock = folder / "reference.pt", folder / "lock"
        self.count = 0
        make(setting.job(table_config(setting)), self.reference)

    def run(self, configurations: Sequence[tuple[str, Config]]) -> Iterator[Outcome]:
        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(lambda numbered: self._one(*numbered), enumerate(configurations, self.count))
        self.count += len(configurations)

    def _one(self, number: int, labelled: tuple[str, Config]) -> Outcome:
        label, config = labelled
        job, result = self.folder / f"{number}.json", self.folder / f"{number}.out.json"
        job.write_text(json.dumps(self.setting.job(config)._asdict()))
        command = [sys.executable, "-m", "glade.ops.linear_attention.triton.trial"]
        command += map(str, (job, result, self.reference, self.lock))
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_A_TRIAL)
        except subprocess.TimeoutExpired:
            return Outcome(label, {}, f"not done in {SECONDS_A_TRIAL} s")
        if ran.returncode != 0 or not result.exists():
            return Outcome(label, {}, (ran.stderr.strip().splitlines() or ["no message"])[-1][:200])
        answer: dict[str, Any] = json.loads(result.read_text())
        return Outcome(label, answer.get("ms", {}), f"wrong: {answer['wrong']}" if "wrong" in answer else "")


def table_config(setting: Setting) -> Config:
    arch = configs.arch_of(torch.device("cuda", torch.cuda.current_device()))
    return configs.nearest(arch, setting.corner, setting.wide, setting.K, setting.V)


def tune(
    setting: Setting, chunks: Sequence[int], launches: Sequence[str], workers: int, say: Callable[[str], None]
) -> Row | None:
    """The row for this setting, or None if nothing is faster than what the table gives.

    Raises:
        RuntimeError: the table's own configuration fails here.
    """
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(setting, Path(folder), workers)
        (base,) = trials.run([("table", table_config(setting))])
        if base.failed:
            raise RuntimeError(f"the table's configuration for {setting}: {base.failed}")
        say(f"{'-'.join(setting.corner)} K{setting.K} V{setting.V} {setting.dtype}: table {base.ms['total']:.3f} ms")
        best, best_ms = None, base.ms["total"]
        for chunk in chunks:
            if setting.corner[0] == "vector" and chunk > configs.LONGEST_OF_A_VECTOR:
                say(f"  chunk {chunk}: vector decays take at most {configs.LONGEST_OF_A_VECTOR}")
                continue
            config = _fastest_parts(trials, chunk, launches, say)
            (together,) = trials.run([(f"chunk {chunk}", config)])
            say(_line(together, "total"))
            if not together.failed and together.ms["total"] < best_ms:
                best, best_ms = config, together.ms["total"]
    if best is None:
        return None
    arch = configs.arch_of(torch.device("cuda", torch.cuda.current_device()))
    return Row(arch, setting.corner, setting.wide, setting.K, setting.V, best)


def _fastest_parts(trials: Trials, chunk: int, launches: Sequence[str], say: Callable[[str], None]) -> Config:
    """The table's configuration with each launch's fastest candidate in its place."""
    setting = trials.setting
    start = table_config(setting)._replace(chunk=chunk)
    tried = [
        x for x in candidates(setting.corner, setting.wide, setting.K, setting.V, chunk)
        if not launches or x.name in launches
    ]  # fmt: skip
    fastest: dict[str, tuple[float, Candidate]] = {}
    for candidate, outcome in zip(tried, trials.run([(str(x), x.within(start)) for x in tried]), strict=True):
        name = kernel_name(setting.corner, setting.wide, candidate.name)
        assert name is not None
        say(_line(outcome, name))
        ms = outcome.ms.get(name)
        if ms is not None and (candidate.name not in fastest or ms < fastest[candidate.name][0]):
            fastest[candidate.name] = (ms, candidate)
    for _, candidate in fastest.values():
        start = candidate.within(start)
    return start


def _line(outcome: Outcome, name: str) -> str:
    found = outcome.failed or f"{outcome.ms.get(name, float('nan')):.3f} ms"
    return f"  {outcome.label:60s} {found}"


def into_table(row: Row) -> None:
    """Replaces the row of the same key, or adds it."""
    rows = [x for x in configs.read_table() if x[:5] != row[:5]]
    configs.write_table([*rows, row])
