"""The learning rate over a budget."""

from itertools import pairwise

import pytest

from glade.train.schedule import learning_rate_factor

SHAPES = ("cosine", "linear", "wsd", "constant")


def factor(progress, schedule="cosine", warmup=0.1, decay=0.2, min_lr=0.1):
    return learning_rate_factor(progress, schedule=schedule, warmup=warmup, decay=decay, min_lr=min_lr)


@pytest.mark.parametrize("schedule", SHAPES)
def test_rises_linearly_then_never_rises(schedule):
    assert factor(0.05, schedule) == pytest.approx(0.5)
    assert factor(0.1, schedule) == pytest.approx(1.0)
    values = [factor(i / 1000, schedule) for i in range(100, 1001)]
    assert all(b <= a + 1e-12 for a, b in pairwise(values))


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.1), ("linear", 0.1), ("wsd", 0.1), ("constant", 1.0)])
def test_ends_where_it_should(schedule, end):
    assert factor(1.0, schedule) == pytest.approx(end)


def test_shapes_between():
    assert factor(0.55, "cosine") == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(0.55, "linear") == pytest.approx(1 - 0.9 * 0.5)
    assert factor(0.79, "wsd") == 1.0
    assert factor(0.9, "wsd") == pytest.approx(1 - 0.9 * 0.5)


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_extreme_settings_stay_in_range(schedule, warmup, decay):
    for i in range(1, 101):
        assert 0 < factor(i / 100, schedule, warmup, decay) <= 1
