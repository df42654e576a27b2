"""The sampler: each rule against its definition, the order of the rules, and the distribution of the draws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glade.errors import ConfigError
from glade.infer.config import SamplingParams
from glade.infer.sampler import gumbel_noise, penalize, restrict, sample

INF = float("inf")


def kept(scores: Tensor) -> list[list[int]]:
    return [[i for i, score in enumerate(row) if score != -INF] for row in scores.tolist()]


def noise(rows: int, vocab: int, position: int = 0) -> Tensor:
    return gumbel_noise(torch.arange(rows), torch.full((rows,), position), vocab)


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def allowed(row: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that may be drawn, from the definitions, one token at a time."""
    order = sorted(range(len(row)), key=lambda i: -row[i])
    order = order[:top_k] if top_k else order
    total = math.fsum(math.exp(row[i]) for i in order)
    nucleus, mass = [], 0.0
    for i in order:
        nucleus.append(i)
        mass += math.exp(row[i]) / total
        if mass >= top_p:
            break
    nucleus = nucleus if top_p < 1 else order
    return {i for i in nucleus if math.exp(row[i]) >= min_p * math.exp(row[order[0]])}


# distinct by construction, far from the thresholds that rounding could move
@settings(deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=12, unique=True),
    st.integers(0, 15),
    st.sampled_from([0.0371, 0.313, 0.5773, 0.9117, 1.0]),
    st.sampled_from([0.0, 0.0131, 0.3137, 1.0]),
)
def test_restriction_is_the_definition(values: list[int], top_k: int, top_p: float, min_p: float) -> None:
    row = [value / 37 for value in values]
    scores = restrict(torch.tensor([row]), top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(kept(scores)[0]) == allowed(row, top_k, top_p, min_p)
    for i in kept(scores)[0]:
        assert scores[0, i] == torch.tensor(row[i])


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = logits_of(0.5, 0.3, 0.15, 0.05)
    assert kept(restrict(logits, top_p=0.4)) == [[0]]
    assert kept(restrict(logits, top_p=0.6)) == [[0, 1]]
    assert kept(restrict(logits, top_p=0.9)) == [[0, 1, 2]]
    assert kept(restrict(logits, top_p=1e-9)) == [[0]]


def test_top_p_of_one_keeps_tails_that_rounding_would_lose() -> None:
    logits = torch.cat([torch.zeros(1, 1), torch.full((1, 1000), -30.0)], dim=1)
    assert len(kept(restrict(logits, top_k=1000, top_p=1.0))[0]) == 1000


def test_top_p_comes_after_top_k_and_renormalises() -> None:
    # of the two kept by top-k, the first has 0.4 / 0.7 = 0.57 of the mass: enough for 0.5, not of the whole
    assert kept(restrict(logits_of(0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.5)) == [[0]]
    assert kept(restrict(logits_of(0.4, 0.3, 0.2, 0.1), top_p=0.5)) == [[0, 1]]


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert kept(restrict(logits_of(0.5, 0.3, 0.15, 0.05), min_p=0.25)) == [[0, 1, 2]]


def test_the_penalty_pushes_down_whatever_the_sign() -> None:
    scores = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[3, 1, 0, 0]])
    assert penalize(scores, seen, torch.tensor([[2.0]])).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_the_penalty_comes_before_the_temperature() -> None:
    # 1.0 / 1.5 falls below 0.9; greedy draws see the penalty too
    logits, seen = torch.tensor([[1.0, 0.9]]), torch.tensor([[1, 0]])
    assert sample(logits, temperature=0, repetition_penalty=1.5, seen=seen).tolist() == [1]


def test_a_rule_can_differ_by_row() -> None:
    logits = logits_of(0.4, 0.3, 0.2, 0.1).repeat(4, 1)
    scores = restrict(
        logits,
        top_k=torch.tensor([1, 0, 3, 0]),
        top_p=torch.tensor([1.0, 0.6, 1.0, 1.0]),
        min_p=torch.tensor([0.0, 0.0, 0.7, 0.0]),
    )
    assert kept(scores) == [[0], [0, 1], [0, 1], [0, 1, 2, 3]]
    drawn = sample(logits, temperature=torch.tensor([0.0, 1e-4, 0.0, 1e-4]), noise=noise(4, 4))
    assert drawn.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = logits_of(0.5, 0.25, 0.15, 0.07, 0.03)
    draws = 40_000
    ids = sample(logits.expand(draws, -1), temperature=temperature, noise=noise(draws, 5, position=9))
    counts = torch.bincount(ids, minlength=5).double()
    expected = (logits.double() / temperature).softmax(-1)[0] * draws
    # chi-squared with 4 degrees of freedom exceeds 23.5 once in ten thousand; the noise is fixed, so this is repeatable
    assert ((counts - expected) ** 2 / expected).sum() < 23.5


def test_noise_is_standard_gumbel_and_finite() -> None:
    values = noise(64, 5000).double()
    assert values.isfinite().all()
    euler = 0.5772156649
    assert abs(values.mean() - euler) < 0.01
    assert abs(values.var() - math.pi**2 / 6) < 0.02
    # the far tail is there: 320,000 draws reach beyond ln(320,000) - 3
    assert values.max() > math.log(values.numel()) - 3


def test_noise_has_no_correlation_between_neighbours() -> None:
    seeds, positions = torch.tensor([0, 1, 0, 2**62]), torch.tensor([0, 0, 1, 0])
    rows = gumbel_noise(seeds, positions, 20_000)
    correlation = torch.corrcoef(torch.cat([rows, rows.roll(1, dims=1)]))
    off = correlation[~torch.eye(8, dtype=torch.bool)]
    assert off.abs().max() < 0.035  # 5 standard deviations of independent rows


def test_a_draw_depends_on_its_seed_and_position_alone() -> None:
    logits = torch.randn(6, 300)
    seeds, positions = torch.tensor([5, 6, 7, 5, 6, 7]), torch.tensor([0, 10, 3, 1, 10, 2**40])
    together = sample(logits, noise=gumbel_noise(seeds, positions, 300))
    for row in range(6):
        one = slice(row, row + 1)
        alone = sample(logits[one], noise=gumbel_noise(seeds[one], positions[one], 300))
        assert alone.item() == together[row].item()


@pytest.mark.parametrize("temperature", [1e-20, 1e-44, 1e-60])
def test_a_low_temperature_ends_at_greedy(temperature: float) -> None:
    logits = torch.randn(20, 100)
    ids = sample(logits, temperature=temperature, top_p=0.9, noise=noise(20, 100))
    assert ids.equal(logits.argmax(-1))


def test_what_is_missing_is_named() -> None:
    logits = torch.randn(2, 5)
    with pytest.raises(ValueError, match="noise is None"):
        sample(logits)
    with pytest.raises(ValueError, match="seen is None"):
        sample(logits, temperature=0, repetition_penalty=1.2)
    with pytest.raises(ValueError, match=r"\[5\]; expected \[B, vocab\]"):
        sample(logits[0], temperature=0)


def test_half_precision_logits_are_drawn_in_fp32() -> None:
    logits = torch.randn(3, 50)
    rounded = logits.bfloat16()
    assert sample(rounded, noise=noise(3, 50)).equal(sample(rounded.float(), noise=noise(3, 50)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": INF},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"stop": ("a", "")},
        {"stop": "a"},
        {"logprobs": -1},
    ],
)
def test_params_out_of_range_are_refused(wrong: dict) -> None:
    (key,) = wrong
    with pytest.raises(ConfigError, match=f"{key} is "):
        SamplingParams(**wrong)
