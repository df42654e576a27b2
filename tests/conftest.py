"""What every test shares: the repeatable seed, `gpu` tests left out where there is no GPU, and Triton without one."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# read when torch is loaded: as the program does, so that threads do not spin beside other work
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def interpret() -> Callable[[Callable[[], None]], None]:
    """interpret(function) calls a function of a test file with Triton's kernels interpreted on the CPU."""
    return lambda function: call_with_triton(function, TRITON_INTERPRET="1")


@pytest.fixture
def without_a_gpu(tmp_path: Path) -> Callable[[Callable[[], None]], None]:
    """without_a_gpu(function) calls a function of a test file with Triton at hand, nothing compiled before."""
    return lambda function: call_with_triton(function, TRITON_CACHE_DIR=str(tmp_path))


def call_with_triton(function: Callable[[], None], **settings: str) -> None:
    """In a process of its own, since Triton decides when it is imported whether it interprets."""
    if sys.platform != "linux":
        pytest.skip("Triton has wheels for Linux only")
    file = Path(inspect.getfile(function))
    settings |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    settings["PYTHONPATH"] = os.pathsep.join([str(file.parent), *sys.path])
    command = [sys.executable, "-c", f"import {file.stem} as tests; tests.{function.__name__}()"]
    ran = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
