"""Settings every test shares: the repeatable seed, and `gpu` tests left out where there is no GPU."""

import os

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
