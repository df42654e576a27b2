"""The order of training batches: every pair once an epoch, a pure function of (seed, step), shares that add up."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glade.data import store as store_module
from glade.data.loader import Batch, Batches, heldout_batches
from glade.data.store import TokenStore
from glade.errors import ConfigError, DataError

MakeStore = Callable[..., TokenStore]


def pairs_of(batch: Batch) -> list[tuple[int, int]]:
    kept = batch.targets[0] >= 0
    return list(zip(batch.ids[0][kept].tolist(), batch.targets[0][kept].tolist(), strict=True))


def all_pairs(store: TokenStore) -> list[tuple[int, int]]:
    documents = (store.document(i).tolist() for i in range(store.num_documents))
    return [pair for d in documents for pair in pairwise(d)]


def check_form(batch: Batch, store: TokenStore, context: int, size: int) -> None:
    assert batch.ids.shape == batch.targets.shape == (1, size)
    assert batch.ids.dtype == batch.targets.dtype == torch.int64 and batch.cu_seqlens.dtype == torch.int32
    borders = batch.cu_seqlens.tolist()
    assert borders[0] == 0 and borders[-1] == size
    lengths = np.diff(borders)
    assert lengths.min() > 0 and lengths.max() <= context
    assert batch.dense == bool((lengths == context).all())
    # tokens are numbered through the store, so a segment of one document is a run of numbers
    for low, high in pairwise(borders):
        ids, targets = batch.ids[0, low:high], batch.targets[0, low:high]
        if targets[0] >= 0:
            assert torch.equal(ids, torch.arange(int(ids[0]), int(ids[0]) + high - low))
            assert torch.equal(targets, ids + 1)


LENGTHS = st.lists(st.integers(2, 70), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, context=st.integers(1, 16), rows=st.integers(1, 5), seed=st.integers(0, 3))
def test_every_pair_once_an_epoch(
    make_store: MakeStore, lengths: list[int], context: int, rows: int, seed: int
) -> None:
    store = make_store(lengths)
    size = context * rows
    batches = Batches(store, context=context, batch_tokens=size, seed=seed)
    # after as many epochs as there are tokens in a batch, batches and epochs end together
    epochs = size // np.gcd(size, store.num_pairs)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(epochs * store.num_pairs // size):
        batch = batches.batch(step)
        check_form(batch, store, context, size)
        assert batch.num_targets == size and batch.num_bytes is None
        seen.update(pairs_of(batch))
    assert seen == {pair: epochs for pair in all_pairs(store)}


def test_each_epoch_by_itself_is_complete(make_store: MakeStore) -> None:
    store = make_store([101, 41, 3, 4, 56])  # 200 pairs
    batches = Batches(store, context=10, batch_tokens=20, seed=1)
    orders = []
    for epoch in range(4):
        pairs = [pair for step in range(10) for pair in pairs_of(batches.batch(epoch * 10 + step))]
        assert sorted(pairs) == all_pairs(store)
        orders.append(pairs)
    assert len({tuple(o) for o in orders}) == 4


def test_long_documents_are_cut_elsewhere_in_every_epoch(make_store: MakeStore) -> None:
    store = make_store([1001])
    batches = Batches(store, context=50, batch_tokens=100, seed=0)
    cuts = []
    for epoch in range(6):
        dense = (batches.batch(epoch * 10 + i) for i in range(10))
        cuts.append({int(b.ids[0, 0]) % 50 for b in dense if b.dense})
    assert all(len(c) == 1 for c in cuts) and len(set.union(*cuts)) > 3


def test_a_batch_depends_on_its_number_alone(make_store: MakeStore) -> None:
    store = make_store([300, 20, 7, 90, 2])
    ahead = Batches(store, context=8, batch_tokens=32, seed=5)
    steps = [40, 3, 0, 17, 100, 3, 41]
    for step in steps:
        fresh = Batches(store, context=8, batch_tokens=32, seed=5).batch(step)
        again = ahead.batch(step)
        assert torch.equal(fresh.ids, again.ids) and torch.equal(fresh.cu_seqlens, again.cu_seqlens)
    other = Batches(store, context=8, batch_tokens=32, seed=6)
    assert any(not torch.equal(ahead.batch(s).ids, other.batch(s).ids) for s in range(3))


def test_the_order_is_written_in_stone(make_store: MakeStore) -> None:
    """A run resumed with a later version of glade or numpy must see what it would have seen."""
    store = make_store([30, 5, 12])
    batches = Batches(store, context=4, batch_tokens=8, seed=0)
    assert batches.batch(0).ids[0].tolist() == [42, 43, 44, 45, 3, 4, 5, 6]
    assert batches.batch(1).ids[0].tolist() == [23, 24, 25, 26, 30, 31, 32, 33]
    assert batches.batch(7).ids[0].tolist() == [9, 10, 11, 12, 1, 2, 3, 4]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_shares_make_up_the_batch(make_store: MakeStore, world: int) -> None:
    store = make_store([50, 13, 8, 100, 31])
    batches = Batches(store, context=4, batch_tokens=24, seed=2)
    for step in range(20):
        whole = batches.batch(step)
        shares = [batches.batch(step, rank=r, world=world) for r in range(world)]
        for share in shares:
            check_form(share, store, 4, 24 // world)
        assert torch.equal(torch.cat([s.ids for s in shares], 1), whole.ids)
        assert torch.equal(torch.cat([s.targets for s in shares], 1), whole.targets)
        assert not whole.dense or all(s.dense for s in shares)


def test_long_documents_give_dense_batches(make_store: MakeStore) -> None:
    long = Batches(make_store([20_000, 31_000]), context=32, batch_tokens=256, seed=0)
    assert sum(long.batch(s).dense for s in range(200)) >= 195
    short = Batches(make_store([20] * 100), context=32, batch_tokens=256, seed=0)
    assert not any(short.batch(s).dense for s in range(10))
    # documents that fit a window are cut by nothing but a batch's end
    lengths = [np.diff(short.batch(s).cu_seqlens) for s in range(7)]
    assert all((n[1:-1] == 19).all() for n in lengths)


def test_many_windows_are_no_burden(make_store: MakeStore) -> None:
    store = make_store([1_000_001])
    batches = Batches(store, context=4, batch_tokens=64, seed=0)
    assert batches.batch(12_345).num_targets == 64


def test_mixture_takes_its_shares_and_keeps_their_orders(make_store: MakeStore) -> None:
    a, b, c = (make_store([n, n], first=10_000 * n) for n in (501, 301, 101))
    batches = Batches([(a, Fraction(1, 2)), (b, 0.3), (c, 0.2)], context=10, batch_tokens=20, seed=0)
    alone = [Batches(s, context=10, batch_tokens=20, seed=0) for s in (a, b, c)]
    counts = [0, 0, 0]
    ids = [[x.batch(s).ids for s in range(300)] for x in alone]
    for step in range(500):
        assert batches.epochs(step) == pytest.approx(
            [n * 20 / s.num_pairs for n, s in zip(counts, (a, b, c), strict=True)]
        )
        batch = batches.batch(step).ids
        source = next(i for i in range(3) if torch.equal(batch, ids[i][counts[i]]))
        counts[source] += 1
        for n, weight in zip(counts, (0.5, 0.3, 0.2), strict=True):
            assert abs(n - weight * (step + 1)) <= 2
    assert torch.equal(
        Batches([(a, 0.5), (b, 0.3), (c, 0.2)], context=10, batch_tokens=20, seed=0).batch(499).ids, batch
    )


def test_what_batches_refuse(make_store: MakeStore) -> None:
    store = make_store([50])
    with pytest.raises(ConfigError, match="100 tokens cannot be cut into windows of 30"):
        Batches(store, context=30, batch_tokens=100, seed=0)
    with pytest.raises(DataError, match="no document"):
        Batches(store.slice(0, 0), context=10, batch_tokens=20, seed=0)
    with pytest.raises(DataError, match="no document"):
        Batches([], context=10, batch_tokens=20, seed=0)
    with pytest.raises(ConfigError, match="positive"):
        Batches([(store, 1), (store, 0)], context=10, batch_tokens=20, seed=0)
    batches = Batches(store, context=10, batch_tokens=20, seed=0)
    with pytest.raises(ConfigError, match="multiple of 40"):
        batches.batch(0, rank=0, world=4)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        batches.batch(0, rank=2, world=2)


@pytest.mark.parametrize("batch_tokens", [8, 13, 64, 500])
def test_heldout_is_read_once_in_order(make_store: MakeStore, batch_tokens: int) -> None:
    store = make_store([30, 2, 9, 17, 41, 3], measured=True)
    batches = list(heldout_batches(store, 8, batch_tokens))
    assert [p for b in batches for p in pairs_of(b)] == all_pairs(store)
    targets = [t for _, t in all_pairs(store)]
    assert sum(b.num_targets for b in batches) == len(targets)
    assert sum(b.num_bytes or 0 for b in batches) == sum(t % 5 + 1 for t in targets)
    assert sum(b.num_words or 0 for b in batches) == sum(t % 2 for t in targets)
    windows = set()
    for batch in batches:
        check_form(batch, store, 8, batch_tokens)
        kept = batch.targets[0] >= 0
        assert kept.sum() == batch.num_targets and bool(kept[: batch.num_targets].all())
        assert batch.num_bytes == int((batch.targets[0][kept] % 5 + 1).sum())
        windows |= {int(batch.ids[0, i]) for i in batch.cu_seqlens[:-1] if i < batch.num_targets}
    # what is seen before each token does not depend on the size of the batch
    starts = store.starts.tolist()
    assert windows == {w for s, e in pairwise(starts) for w in range(s, e - 1, 8)}


def test_heldout_part_is_spread_and_exact(make_store: MakeStore) -> None:
    store = make_store([1001, 201], measured=True)
    batches = list(heldout_batches(store, 10, 40, max_tokens=235))
    pairs = [p for b in batches for p in pairs_of(b)]
    assert len(pairs) == len(set(pairs)) == 235 and set(pairs) <= set(all_pairs(store))
    assert sum(b.num_bytes or 0 for b in batches) == sum(t % 5 + 1 for _, t in pairs)
    firsts = [i for i, _ in pairs][::10]
    assert firsts[0] == 0 and firsts[-1] > 1001 and max(np.diff(firsts)) <= 60
    assert sum(b.num_targets for b in heldout_batches(store, 10, 40, max_tokens=10**9)) == store.num_pairs


def test_heldout_of_an_unmeasured_split_says_so(make_store: MakeStore) -> None:
    (batch,) = heldout_batches(make_store([20]), 8, 64)
    assert batch.num_targets == 19 and batch.num_bytes is None and batch.num_words is None


def test_what_heldout_refuses(make_store: MakeStore) -> None:
    store = make_store([20])
    for context, size, max_tokens, error in (
        (8, 7, None, ConfigError),
        (0, 7, None, ConfigError),
        (8, 8, 0, ConfigError),
    ):
        with pytest.raises(error):
            next(heldout_batches(store, context, size, max_tokens))
    with pytest.raises(DataError, match="heldout"):
        next(heldout_batches(store.slice(0, 0), 8, 8))


def test_shards_are_one_store(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_store([30, 9, 2, 44, 5, 5], measured=True)
    monkeypatch.setattr(store_module, "SHARD_TOKENS", 40)
    split = make_store([30, 9, 2, 44, 5, 5], measured=True)
    assert len(split._shards) == 4
    assert [split.document(i).tolist() for i in range(6)] == [whole.document(i).tolist() for i in range(6)]
    for step in range(10):
        a, b = (Batches(s, context=4, batch_tokens=16, seed=0).batch(step) for s in (whole, split))
        assert torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets)
    part = split.slice(3, 5)
    assert part.num_tokens == 49 and part.num_pairs == 47 and part.document(1).tolist() == whole.document(4).tolist()
    assert [p for b in heldout_batches(part, 4, 16) for p in pairs_of(b)] == all_pairs(part)
    with pytest.raises(IndexError):
        part.document(2)
