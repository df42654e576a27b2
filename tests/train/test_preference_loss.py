"""The losses against their formulas with numbers anyone can check, and against autograd's idea of their gradients."""

import math

import pytest
import torch

from glade.train.preference_loss import LOSSES, PairLogProbs, hinge, ipo, orpo, sigmoid, sigmoid_norm, simpo

POLICY = PairLogProbs(*(torch.tensor([x], dtype=torch.float64) for x in (-10.0, -12.0, 5.0, 4.0)))
REFERENCE = PairLogProbs(*(torch.tensor([x], dtype=torch.float64) for x in (-11.0, -9.0, 5.0, 4.0)))
# log-ratios: chosen +1, rejected -3; as means over 5 and 4 tokens: +0.2, -0.75


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def value(loss):
    return loss[0].item()


def test_sigmoid():
    assert value(sigmoid(POLICY, REFERENCE, beta=0.5)) == pytest.approx(-log_sigmoid(0.5 * 4))
    smoothed = sigmoid(POLICY, REFERENCE, beta=0.5, label_smoothing=0.1)
    assert value(smoothed) == pytest.approx(-0.9 * log_sigmoid(2) - 0.1 * log_sigmoid(-2))


def test_ipo_pulls_the_mean_margin_to_half_over_beta():
    assert value(ipo(POLICY, REFERENCE, beta=0.25)) == pytest.approx((0.95 - 2) ** 2)


def test_hinge_is_zero_beyond_its_margin():
    assert value(hinge(POLICY, REFERENCE, beta=0.1)) == pytest.approx(1 - 0.4)
    assert value(hinge(POLICY, REFERENCE, beta=0.5)) == 0


def test_sigmoid_norm_counts_tokens():
    assert value(sigmoid_norm(POLICY, REFERENCE, beta=2.0)) == pytest.approx(-log_sigmoid(2 * 0.95))


def test_simpo_has_no_reference():
    assert value(simpo(POLICY, beta=2.0, gamma=0.5)) == pytest.approx(-log_sigmoid(2 * (-2 + 3) - 0.5))


def test_orpo():
    def log_odds(p):
        return math.log(p / (1 - p))

    ratio = log_odds(math.exp(-2)) - log_odds(math.exp(-3))
    assert value(orpo(POLICY, beta=0.3)) == pytest.approx(2 - 0.3 * log_sigmoid(ratio))


def test_orpo_stays_finite_where_an_answer_is_certain():
    certain = PairLogProbs(*(torch.tensor([x]) for x in (0.0, -1e-9, 5.0, 4.0)))
    loss, _ = orpo(certain, beta=0.1)
    assert loss.isfinite().all()


def test_metrics_are_told_apart_pair_by_pair():
    policy = PairLogProbs(*(torch.tensor(x) for x in ([-1.0, -5.0], [-2.0, -1.0], [1.0, 1.0], [1.0, 1.0])))
    reference = PairLogProbs(*(torch.tensor(x) for x in ([-2.0, -2.0], [-2.0, -2.0], [1.0, 1.0], [1.0, 1.0])))
    loss, metrics = sigmoid(policy, reference, beta=0.1)
    assert loss.shape == (2,)
    torch.testing.assert_close(metrics["rewards_chosen"], torch.tensor([0.1, -0.3]))
    torch.testing.assert_close(metrics["rewards_rejected"], torch.tensor([0.0, 0.1]))
    torch.testing.assert_close(metrics["margin"], torch.tensor([0.1, -0.4]))
    assert metrics["accuracy"].tolist() == [1, 0]
    assert metrics["logp_chosen"].tolist() == [-1, -5]
    # where neither is preferred, as before the first step, half of the pairs count as right
    assert sigmoid(policy, policy, beta=0.1)[1]["accuracy"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_pushes_chosen_up_and_rejected_down(name):
    needed = {"simpo": {"gamma": 0.5}}.get(name, {})
    chosen = torch.tensor([-10.0, -2.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-9.0, -4.0], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([5.0, 4.0], dtype=torch.float64)

    def loss(chosen, rejected):
        policy = PairLogProbs(chosen, rejected, tokens, tokens)
        reference = PairLogProbs(chosen.detach() - 0.01, rejected.detach() + 0.01, tokens, tokens)
        models = (policy,) if name in ("simpo", "orpo") else (policy, reference)
        return LOSSES[name](*models, beta=0.3, **needed)[0]

    values = loss(chosen, rejected)
    values.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
