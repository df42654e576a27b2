"""A token store made by hand, for tests of what reads one."""

from collections.abc import Callable

import numpy as np
import pytest

from glade.data.store import SplitWriter, TokenStore

MakeStore = Callable[..., TokenStore]


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """`make_store([30, 5])`: documents of 30 and 5 tokens; each token of a store is a number of its own."""

    def make(lengths: list[int], *, measured: bool = False, first: int = 0) -> TokenStore:
        folder = tmp_path_factory.mktemp("store")
        writer = SplitWriter(folder, "part", "<u4", measured=measured)
        for length in lengths:
            ids = np.arange(first, first + length)
            writer.add(ids, 0, 0, (ids % 5 + 1, ids % 2) if measured else None)
            first += length
        return TokenStore.open(folder, writer.finish()["shards"], "<u4")

    return make
