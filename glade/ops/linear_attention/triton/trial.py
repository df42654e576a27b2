"""One configuration, checked and then timed, in a process of its own: an illegal access ends a CUDA context for good.

    python -m glade.ops.linear_attention.triton.trial JOB RESULT REFERENCE LOCK

JOB is a JSON file (`Job`), RESULT the one to write. The check is against fp64 gradients made once (REFERENCE, `make`)
and repeated, since a race shows as other bits; then the timed shape must give the same bits three times. Checks of
several processes share the device, a timing has it alone: LOCK is held for all of them, or by one.
"""

import fcntl
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from glade.ops.linear_attention import linear_attention
from glade.ops.linear_attention.parity import (
    Corner,
    Shape,
    failures,
    gate_gradient_scale,
    make_inputs,
    run_with_gradients,
)
from glade.ops.linear_attention.triton import configs
from glade.ops.linear_attention.triton.configs import Config, Launch
from glade.ops.linear_attention.triton.hopper import launches
from glade.ops.tolerances import relative_error

REPEATS = 3


class Job(NamedTuple):
    corner: tuple[str, ...]
    dtype: str
    K: int
    V: int
    checked: tuple[int, int, int]  # B, T, H of the shape that is compared with fp64
    timed: tuple[int, int, int]
    chunk: int
    span: int
    launches: dict[str, list[int]]

    @property
    def config(self) -> Config:
        return Config(self.chunk, span=self.span, **{name: Launch(*x) for name, x in self.launches.items()})

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def inputs(self, lead: tuple[int, int, int], gate: str = "mild", drawn_on: str = "cpu") -> dict[str, Any]:
        shape, where = Shape(*lead, lead[2], self.K, self.V), {"device": "cuda", "drawn_on": drawn_on}
        return make_inputs(Corner(*self.corner), shape, gate=gate, dtype=self.torch_dtype, **where)


def job_of(corner: tuple[str, ...], dtype: str, K: int, V: int, checked, timed, config: Config) -> Job:
    launches = {name: list(x) for name, x in config._asdict().items() if isinstance(x, Launch)}
    return Job(corner, dtype, K, V, checked, timed, config.chunk, config.span, launches)


def gates_of(job: Job) -> tuple[str, ...]:
    return ("mild",) if job.corner[0] == "none" else ("mild", "extreme")


def make(job: Job, path: Path) -> None:
    """Writes the fp64 outputs and gradients of the checked shape, in fp32, by gate."""
    reference = {}
    for gate in gates_of(job):
        inputs = {name: x if x is None else x.double() for name, x in job.inputs(job.checked, gate).items()}
        exact = run_with_gradients(inputs, "torch")
        scale = gate_gradient_scale(inputs, exact) if "dg" in exact else None
        reference[gate] = ({name: x.float().cpu() for name, x in exact.items()}, scale)
    torch.save(reference, path)


def check(job: Job, reference: Path) -> dict[str, float]:
    """The tensors that are beyond their tolerance; `repeats` among them if two runs differed."""
    wrong: dict[str, float] = {}
    for gate, (exact, scale) in torch.load(reference).items():
        inputs = job.inputs(job.checked, gate)
        first = run_with_gradients(inputs, "triton")
        found = {
            name: relative_error(x, exact[name].to(x.device), scale if name == "dg" else None)
            for name, x in first.items()
        }
        wrong |= failures(found, job.torch_dtype)
        if not all(_same(first, run_with_gradients(inputs, "triton")) for _ in range(REPEATS)):
            wrong["repeats"] = float("inf")
    return wrong


def _same(first: dict[str, Tensor], again: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, again[name]) for name, x in first.items())


def work_of(job: Job) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of the timed shape, from zeros as in training."""
    inputs = {
        name: x.requires_grad_()
        for name, x in job.inputs(job.timed, drawn_on="cuda").items()
        if x is not None and name != "state"
    }
    gates = {name: inputs[name] for name in ("g", "erase", "write") if name in inputs}
    do = torch.randn_like(inputs["v"])

    def work() -> tuple[Tensor, ...]:
        o, _ = linear_attention(inputs["q"], inputs["k"], inputs["v"], **gates, backend="triton")
        return torch.autograd.grad(o, list(inputs.values()), do)

    return work


def kernel_ms(work: Callable[[], object], repeats: int = 10) -> dict[str, float]:
    """Milliseconds a call of each kernel, by the profiler, and "total" of all kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
    times = {e.key: e.device_time_total / repeats / 1e3 for e in seen.key_averages() if e.device_time_total > 0}
    return {**times, "total": sum(times.values())}


@contextmanager
def holding(lock: Path, how: int) -> Iterator[None]:
    with lock.open("a") as file:
        fcntl.flock(file, how)
        yield


def trial(job: Job, reference: Path, lock: Path) -> dict[str, Any]:
    configs.nearest = lambda *_: job.config
    launches.AVAILABLE = False  # the table is of the kernels in Triton
    with holding(lock, fcntl.LOCK_SH):
        wrong = check(job, reference)
        if wrong:
            return {"wrong": {name: str(error) for name, error in wrong.items()}}
        work = work_of(job)
        first = work()
        again = [work() for _ in range(REPEATS)]
        if not all(torch.equal(x, y) for gradients in again for x, y in zip(first, gradients, strict=True)):
            return {"wrong": {"repeats at the timed shape": "inf"}}
        if not all(x.isfinite().all() for x in first):
            return {"wrong": {"finite at the timed shape": "inf"}}
        del first, again
    with holding(lock, fcntl.LOCK_EX):
        return {"ms": kernel_ms(work)}


def main() -> None:
    job_path, result, reference, lock = map(Path, sys.argv[1:5])
    job = Job(**json.loads(job_path.read_text()))
    job = job._replace(**{name: tuple(getattr(job, name)) for name in ("corner", "checked", "timed")})
    result.write_text(json.dumps(trial(job, reference, lock)))


if __name__ == "__main__":
    main()
